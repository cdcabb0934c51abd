"""The input pipeline: data sets, and augmented batches of them on the device."""
