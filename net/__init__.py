"""The network: CustomResNet, knows nothing but torch."""
