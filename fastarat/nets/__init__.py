"""Networks: split BatchNorm, the built-in architectures, and the network as an attack sees it."""
