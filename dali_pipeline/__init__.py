"""The input pipeline: data sets as CIFAR records, and augmented batches of them on the device."""
