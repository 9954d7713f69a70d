"""Entry point of ``python -m starseg``."""

from starseg.cli.main import main

main()
