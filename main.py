"""Entry point: ``python main.py {chain,compress,fit,validate,test,predict,benchmark} --help``."""

from d2dmoe_pl.entry import main

if __name__ == "__main__":
    main()
