"""One group of checks, in the process that :mod:`jobs.doctor.diagnosis` gives it."""

from jobs.doctor.diagnosis import main

main()
