"""Training files: read, checked, mended and split, for learners and for the service alike.

`rows` knows what an example is, and `validation` checks a file as the service does. `prepare` adds
what only a person can decide: `formats` reads any file, `scan` passes over it once, `examine` looks
at a batch of its rows, `evidence` gathers what they show, `findings` says what that means in the
words of `catalogue`, `fixes` mend, `split` holds out, `report` shows; `similar` finds
near-duplicates and `privacy` secrets. `command` is `labkit prepare`.
"""

from labkit.examples.rows import MAX_DEPTH as MAX_DEPTH
from labkit.examples.rows import MAX_FILE as MAX_FILE
from labkit.examples.rows import MAX_LINE as MAX_LINE
from labkit.examples.rows import MAX_LINES as MAX_LINES
from labkit.examples.rows import MINIMUM as MINIMUM
from labkit.examples.rows import ROLES as ROLES
from labkit.examples.rows import Chat as Chat
from labkit.examples.rows import Completion as Completion
from labkit.examples.rows import Example as Example
from labkit.examples.rows import Preference as Preference
from labkit.examples.rows import Problem as Problem
from labkit.examples.rows import auto_epochs as auto_epochs
from labkit.examples.rows import parse as parse
from labkit.examples.rows import too_deep as too_deep
from labkit.examples.validation import Report as Report
from labkit.examples.validation import check as check
from labkit.examples.validation import first_unreadable as first_unreadable
