"""The kernels in other people's projects, each part imported only where it is used."""
