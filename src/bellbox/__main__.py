"""`python -m bellbox`, for launchers that start modules."""

from bellbox.cli.main import main

if __name__ == "__main__":
    main()
