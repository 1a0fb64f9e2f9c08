"""The base paper's Table 2 (arXiv 2312.17238) on the simulated machine: fitted on its 2-bit half,
predicted on its 3-bit half."""
