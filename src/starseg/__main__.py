from starseg.cli import main

main()
