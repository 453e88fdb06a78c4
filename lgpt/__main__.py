"""`python -m lgpt` and `deepspeed --module lgpt`: the command line."""

from lgpt.cli import main

if __name__ == "__main__":
    main()
