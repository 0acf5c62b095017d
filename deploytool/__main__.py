"""`python -m deploytool` is the command `deploytool`."""

from deploytool.cli.main import main

if __name__ == "__main__":
    main()
