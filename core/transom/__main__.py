"""`python -m transom`: the command `transom`, for an environment whose scripts are not on the path."""

from transom.cli import main

if __name__ == "__main__":
    main()
