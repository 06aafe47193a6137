"""Many runs of one experiment: what is varied, which runs that makes, and who does them.

A sweep's own Gin file binds `sweep`. Its runs are those of `fedexp.main`, each with a folder and a command
of its own, so that nothing of a sweep is part of any experiment.
"""
