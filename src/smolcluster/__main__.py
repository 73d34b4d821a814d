"""`python -m smolcluster`: the same as `smolcluster`, where the scripts folder is not on the path."""

from smolcluster.cli import main

main()
