"""Entry point: ``python main.py {fit,validate,test,predict,chain,benchmark} --help``."""

from d2dmoe_pl.entry import main

if __name__ == "__main__":
    main()
