"""``python -m d2dmoe_pl``: the command line."""

from d2dmoe_pl.entry import main

if __name__ == "__main__":
    main()
