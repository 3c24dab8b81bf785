"""The commands of `gem-ray`, a module a subject."""
