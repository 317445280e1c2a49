"""python -m effc: the same as the `effc` command."""

from effc.runtime.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
