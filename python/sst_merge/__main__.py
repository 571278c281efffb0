"""`python -m sst_merge` is `sst-merge`."""

from .cli import main

if __name__ == "__main__":
    main()
