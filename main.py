"""Entry point: ``python main.py {fit,validate,test,predict,chain,benchmark} --help``."""

from d2dmoe_pl.cli import main

if __name__ == "__main__":
    main()
