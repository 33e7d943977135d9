"""`python -m labutils`. Written so that even an old Python can read it and say what is wrong."""

import sys

if sys.version_info < (3, 11):
    sys.exit(
        "labutils: this course needs Python 3.11 or newer, and this one is %d.%d: install a newer Python from "
        "https://www.python.org/downloads/ and run the same command with it, for example "
        "python3.12 -m labutils lab" % sys.version_info[:2]
    )

if __name__ == "__main__":
    from labutils.course.cli.main import main

    sys.exit(main())
