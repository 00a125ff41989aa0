"""Everything that a GPU machine is asked for, by one command: checks, tests, tuning, suites and trainings."""
