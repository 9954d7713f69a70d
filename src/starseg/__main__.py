from starseg.cli.main import main

main()
