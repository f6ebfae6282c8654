"""Python loads this before all else, where its folder is on PYTHONPATH: no way to the network.

Every attempt, to this machine itself too, raises OSError, and is a line of the file that
NETWORK_LOG names. `support.without_network` sets both. Code that is not Python's is not seen.
"""

import os
import socket
import sys

LOOKED_UP = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")
USED = ("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg")
INTERNET = (socket.AF_INET, socket.AF_INET6)
# urllib3 binds a socket so when it is imported, to see whether there is IPv6, and closes it.
HARMLESS = ("socket.bind", ("::1", 0))


def refuse(event: str, arguments: tuple) -> None:
    """Called by Python at each event that it audits, wherever it comes from."""
    internet = event in USED and arguments[0].family in INTERNET
    if (internet or event in LOOKED_UP) and (event, arguments[-1]) != HARMLESS:
        attempt = f"{event} {arguments[internet:]} by {' '.join(sys.orig_argv)}"
        with open(os.environ["NETWORK_LOG"], "a", encoding="utf-8") as log:
            log.write(attempt.replace("\n", " ") + "\n")
        raise OSError(f"no network in this test: {attempt}")


sys.addaudithook(refuse)
