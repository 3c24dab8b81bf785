"""`python -m gem_ray`: the command `gem-ray`, where its script is not on the path."""

from gem_ray.cli import command

command()
