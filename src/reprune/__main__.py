"""`python -m reprune`: the same as `reprune`, for torchrun's -m."""

from reprune.run import main

main()
