"""UserError: what a user can mend, told in one sentence. Whatever else is raised is a slip of ours, and shows where."""

import errno

NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)  # how a full disk, and whoever limits it, says so


class UserError(ValueError):
    """Wrong flags, data, files or machines; the message says what is wrong, where, and what to do.

    Programs catch it and print the sentence alone. Every other exception goes through with its traceback, ValueError
    too: torch and Python raise those over mistakes that no flag will cure.
    """
