"""Other ways to run the experts that a mask selects, one file each, as in :mod:`d2dmoe_pl.moe.kernels`.

They are here to be compared with; models do not run on them.
"""
