#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""tentacle.py - an Octopus Tentacle in one Python file that needs nothing but Python.

Copied to a host, it lets a deployment server (an Octopus Server as it is, or this same file as the
dispatcher) run scripts and move files there. Both sides know each other by the thumbprint of their
certificate.

    python3 tentacle.py listen --trust THUMBPRINT       on the host
    python3 tentacle.py poll https://server:10943/ --trust THUMBPRINT        or this
    python3 tentacle.py exec host -- uptime             from elsewhere
    python3 tentacle.py setup                           with an Octopus Server; or the original's
                                                        commands, `tentacle.py help` lists them

or from Python (`help(tentacle.run)` has an example that runs):

    import tentacle
    result = tentacle.run("https://host:10933/", "echo hi", thumbprint="6D7A...EFB3")

The wire (Halibut), as a byte travels; C calls, T is the listening tentacle (a polling one dials,
says MX-SUBSCRIBER, and NEXT after each answer; a null request is the server's keep-alive):

    C -> T   TLS handshake, a certificate on both sides; who is not pinned gets no further
    C -> T   MX LF LF                                    "I am no browser"
    C -> T   MX-CLIENT 1.0 CRLF CRLF
    T -> C   MX-SERVER 1.0 CRLF CRLF
    C -> T   request     raw DEFLATE of one BSON document {"Message": {...}}, then its data
    T -> C   response    streams: id (16), length (8), the bytes, the length again (8)
    C -> T   NEXT CRLF                                   another call on this connection, or END
    T -> C   PROCEED CRLF                                then a request again

Threads: the main thread waits for signals; `listener` accepts; `connection ADDRESS` (one each)
shakes hands, reads requests and runs the services, or hands a polling tentacle its calls; `idle
connections` waits for those polling tentacles that have none; `polling ADDRESS` (one a connection)
is the service of a server it dials; `relay` and `relayed call` take the calls of other processes to
a polling tentacle; `file` reads, hashes and writes a long file beside the thread that has the wire;
`target` runs a script on one of several targets, and `jobs` (in `serve`, 32, and one more for each
call of a listening tentacle) those that are kept; `once` polls one server from cron; `cleaner`
looks after scripts every two hours, `settings` every two seconds at the time of the settings file.
A script that runs has no thread here: its processes are listed at the top of section 13.

Sections, in the order of the file; a definition uses only what stands above it:

     0  Imports and names                      10  Identification and control messages
     1  Errors                                 11  Message exchange
     2  Timeouts and limits                    12  Service invocation
     3  Logging and threads                    13  Script execution
     4  Certificates and thumbprints           14  Tentacle services
     5  Secure streams                         15  Listening
     6  Proxies and dialling                   16  Polling
     7  BSON                                   17  Dispatcher
     8  Messages                               18  Configuration
     9  Message serializer                     19  Command line

"wire notes" in the comments below are the project's notes on Halibut, with their section.
"""

# ---- 0. Imports and names ------------------------------------------------------------------------
# What one command alone needs (argparse, configparser, xml, subprocess, tempfile, shutil ...) is
# imported where it is used: an idle agent then fits in half the memory, and starts sooner.

import os
import signal
import sys

#: What runs. Helpers and resident processes go on from it: whatever is on the disk by then, all
#: are of one version, nothing is compiled twice, and no bytecode file is read or written.
_CODE = sys._getframe().f_code
#: Verbs that stay for long. CPython keeps the syntax tree of a script for as long as it runs, for
#: this file some 20 MB; a process that begins with the code needs none, and no site-packages.
_RESIDENT_VERBS = ('listen', 'poll', 'serve', 'agent', 'run')
_RUN_CODE = """import signal
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import marshal, os, sys
del sys.argv[0]
_code = int(sys.argv.pop(0))
__file__ = sys.argv[0]
_code = marshal.loads(os.pread(_code, os.fstat(_code).st_size, 0)), os.close(_code)
exec(_code[0])"""


def code_descriptor() -> int:
    """A new descriptor of a file without a name that holds the code; not inherited."""
    import marshal

    if hasattr(os, 'memfd_create'):
        descriptor = os.memfd_create('tentacle.py')
    else:
        import tempfile

        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    with open(descriptor, 'wb', closefd=False) as file:
        marshal.dump(_CODE, file)
    return descriptor


def code_command(descriptor: int, *arguments: str) -> list:
    """The command line of another process of this code, that inherits the descriptor."""
    words = [sys.executable or '/proc/self/exe', '-I', '-S', '-c', _RUN_CODE, str(descriptor)]
    return words + [os.path.abspath(__file__)] + list(arguments)


if __name__ == '__main__':
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of an import: until `main`

if __name__ == '__main__' and '_code' not in globals() and __spec__ is None:
    if sys.argv[1:2] and sys.argv[1] in _RESIDENT_VERBS:
        _descriptor = code_descriptor()
        os.set_inheritable(_descriptor, True)
        _words = code_command(_descriptor, *sys.argv[1:])
        os.execv(_words[0], _words)

import base64
import codecs
import contextlib
import errno
import functools
import hashlib
import io
import itertools
import json
import logging
import random
import re
import secrets
import select
import selectors
import socket
import socketserver
import ssl
import stat
import struct
import threading
import time
import uuid
import zlib
import _thread
from collections import OrderedDict
from typing import (
    Any,
    BinaryIO,
    Callable,
    Container,
    Dict,
    FrozenSet,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
    Union,
)

__version__ = '0.1.0'
#: The version of the original whose contracts we keep: a server judges an agent's age by it.
TENTACLE_VERSION = '9.0.0'

__all__ = [
    'run',
    'AgentServices',
    'ListeningTentacle',
    'PollingTentacle',
    'PollingServer',
    'PolledClient',
    'PolledConnection',
    'TentacleClient',
    'Dispatcher',
    'TargetResult',
    'FanOut',
    'Targets',
    'Job',
    'JobStore',
    'LogEntry',
    'ScriptFile',
    'Identity',
    'Limits',
    'Proxy',
    'ServiceEndPoint',
    'ScriptResult',
    'OutputLine',
    'TentacleError',
    'ConnectionLost',
    'NotDelivered',
    'UntrustedThumbprint',
    'ProtocolError',
    'ServiceError',
    'UsageError',
    'Cancelled',
    'Transferred',
]


# ---- 1. Errors -----------------------------------------------------------------------------------
# Named by what the caller can do next. Any other exception that comes out of this module is a bug.


class TentacleError(Exception):
    """Something failed that a person can mend; the text says what was expected, what came, and what
    to do.
    """

    exit_code = 1


class ConnectionLost(TentacleError):
    """The connection is gone, or was never made: dial again. A request that was written may have
    run.
    """


class NotDelivered(ConnectionLost):
    """The call never left this side: nothing has run, it may be made again."""


class UntrustedThumbprint(TentacleError):
    """One side does not trust the other's certificate: pinning helps, dialling again does not."""

    def __init__(self, message: str, thumbprint: Optional[str] = None):
        super().__init__(message)
        self.thumbprint = (
            thumbprint  #: of the certificate that was not trusted, None when it was not seen
        )


class ProtocolError(TentacleError):
    """The other side does not keep to the protocol, or went over a limit: never retry."""


class ServiceError(TentacleError):
    """The other side took the call and answers with an error."""

    def __init__(
        self, message: str, error_type: Optional[str] = None, details: Optional[str] = None
    ):
        super().__init__(message)
        self.error_type = error_type  #: the `HalibutErrorType` of the answer, or None
        self.details = details  #: the other side's long text, often a stack trace


class Cancelled(TentacleError):
    """We were asked to stop, and had it stopped there."""


class UsageError(TentacleError):
    """The command line, or a parameter, is wrong: mend it."""

    exit_code = 2


# ---- 2. Timeouts and limits ----------------------------------------------------------------------


class Limits(NamedTuple):
    """Every timeout (seconds) and every bound on what a peer may make us hold, with its reason."""

    # -- time
    handshake: float = 60.0  # TLS, MX and identification together: all of a stranger's time
    connect: float = 60.0  # TCP connect of a dialler (wire notes 2)
    progress: float = 60.0  # between two bytes of one message, either way (wire notes 2)
    response: float = 300.0  # a caller's wait for the first byte of an answer (wire notes 2)
    request: float = 60.0  # a polling tentacle's wait for a request: null comes after 30 (notes 2)
    keep_alive: float = 30.0  # a server's wait for work, then it sends null (wire notes 2)
    linger: float = 1.0  # a server's thread stays with a connection for its next call
    queue: float = 120.0  # a call's wait for its tentacle to poll, where its caller sets no other
    least_back_off: float = 5.0  # between two dials of a polling tentacle (wire notes 2)
    most_back_off: float = 120.0
    acknowledge: float = 600.0  # `poll --once` waits so long for a script to be completed
    idle: float = 600.0  # a listener's wait for NEXT: a client pools a connection for 9 minutes
    pooled: float = 540.0  # what our own dispatcher pools it for
    start_wait: float = 240.0  # longest wait inside StartScript: below the caller's `response`
    launch: float = 10.0  # for a launcher's answer: one that hangs is killed, and replaced
    cancel_grace: float = 2.0  # from SIGTERM to SIGKILL
    predecessor: float = 10.0  # an agent's wait for the end of the one before it
    stop: float = 5.0  # a stopping listener's wait for its connections' threads
    cancelled_script: float = 15.0  # a wait for the end of a script that was cancelled
    reconnect_pause: float = 1.0  # before a dispatcher asks again for a script's status,
    reconnect_attempts: int = 5  # and how often it does (wire notes 2)
    # -- what arrives
    proxy_answer: int = 16 << 10  # bytes of a proxy's headers
    greeting: int = 20000  # characters up to the blank line (wire notes 1)
    control_line: int = 1000  # characters of a control line: the longest has a subscription's URI
    request_bytes: int = 32 << 20  # of an inflated request: script bodies reach some MiB
    request_elements: int = 200000  # of its BSON: a few dozen, plus variables and files
    response_bytes: int = 128 << 20  # the original sends all new lines of a log in one answer
    response_elements: int = 200000  # but for a log, whose lines are read one by one
    nesting: int = 32  # documents within documents: the contracts need 6
    data_streams: int = 1000  # of one message: each is a file of a script
    spare_disk: int = 64 << 20  # bytes that a data stream must leave free on the disk
    read_past: int = 1 << 30  # bytes of data streams nobody takes: the sender hears why only then
    stream_in_memory: int = 64 << 10  # a data stream up to this size never touches the disk
    # -- what we serve
    connections: int = 1000  # of pinned peers at once: a thread each
    polling_connections: int = 5000  # the same of a server that tentacles poll
    strangers: int = 512  # connections that have not shaken hands; beyond it the oldest goes
    thread_stack: int = 512 << 10  # bytes of address space for a connection's thread
    log_line: int = 10 << 20  # bytes of a line of output, as the original; a longer one is cut
    log_bytes: int = 1 << 30  # of a script's log: past it the script goes on, its lines are counted
    log_answer_lines: int = 1000000  # of one status answer, which our own client takes whole; a
    log_answer_bytes: int = 64 << 20  # client that must ask again sleeps longer each time
    remembered: float = 86400.0  # seconds for which a completed ticket is not run again
    remembered_tickets: int = 100000  # at most: an inode each
    # -- what we write
    log_file: int = 10 << 20  # bytes of OctopusTentacle.txt and audit.jsonl; then a new one begins,
    old_logs: int = 7  # and so many old ones are kept
    settings_look: float = 2.0  # seconds between two looks whether who is trusted has changed
    # -- what `serve` keeps
    job_lines: int = 1000000  # of one job's output,
    job_characters: int = 256 << 20  # and of their text
    job_steps: int = 4  # calls at once for the jobs of one tentacle: the others have theirs

    def __repr__(self) -> str:
        """Short, since it stands in many signatures."""
        changed = [
            name for name, value in self._asdict().items() if value != self._field_defaults[name]
        ]
        return 'Limits(%s)' % ', '.join('%s=%r' % (name, getattr(self, name)) for name in changed)


LIMITS = Limits()


# ---- 3. Logging and threads ----------------------------------------------------------------------

logger = logging.getLogger('tentacle')
wire_logger = logging.getLogger('tentacle.wire')


def printable(text: Any, limit: int = 300) -> str:
    """A peer's text for a log or a terminal: one line, no control characters, at most `limit`
    characters.
    """
    text = str(text)
    shown = ''.join(c if c.isprintable() else repr(c)[1:-1] for c in text[:limit])
    return shown + '...' if len(text) > limit else shown


def nearest(word: str, words: Iterable[str]) -> str:
    """A hint at what may be meant, or ''."""
    import difflib

    near = difflib.get_close_matches(word, words, 1)
    return '; did you mean %s?' % near[0] if near else ''


class Secret(str):
    """Text that must not be shown: `str`, `repr` and formatting give stars, `encode` the text."""

    def __repr__(self) -> str:
        return "'***'"

    def __str__(self) -> str:
        return '***'

    def __format__(self, spec: str) -> str:
        return format('***', spec)


#: One JSON object a line, where a command opens it; silent until then.
audit_logger = logging.getLogger('tentacle.audit')
audit_logger.propagate = False
audit_logger.setLevel(logging.CRITICAL)
audit_logger.addHandler(logging.NullHandler())

#: On the thread of a connection: `peer` (its address) and `thumbprint`.
caller = threading.local()


def iso_time(milliseconds: int) -> str:
    """Milliseconds since 1970 as ISO 8601, in UTC."""
    seconds, rest = divmod(milliseconds, 1000)
    return time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds)) + '.%03dZ' % rest


def audit(event: str, **facts: Any) -> None:
    """Record who did what: an event with its time, the connection of this thread, and facts, in
    which no contents and no secrets stand. Any thread may call; never raises.
    """
    if audit_logger.isEnabledFor(logging.INFO):
        entry = {'time': iso_time(int(time.time() * 1000)), 'event': event}
        entry.update(vars(caller))
        entry.update(facts)
        audit_logger.info(json.dumps(entry))


@functools.lru_cache(maxsize=None)
def user_name() -> str:
    """Of this process's user; its number where it has no name."""
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def start_thread(name: str, target: Callable[..., None], *args: Any) -> threading.Thread:
    """Start a daemon thread: a thread of ours never keeps the process from ending. Raises OSError
    where there is none to be had.
    """
    thread = threading.Thread(target=target, args=args, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, str(error))
    return thread


def start_connection_thread(name: str, target: Callable[..., None], *args: Any) -> None:
    """Start a thread that nobody joins. Raises OSError at once where there is none to be had;
    `Thread.start` would wait for ever for one that died at its birth.
    """

    def begin() -> None:
        try:
            threading.current_thread().name = name
            target(*args)
        finally:  # `threading` would list it until another thread has its number (before 3.12)
            getattr(threading, '_active', {}).pop(_thread.get_ident(), None)

    try:
        _thread.start_new_thread(begin, ())
    except (RuntimeError, MemoryError) as error:
        raise OSError(errno.EAGAIN, str(error))


# ---- 4. Certificates and thumbprints -------------------------------------------------------------
# A peer is the hash of its DER certificate. What we write ourselves is one certificate: RSA-2048,
# SHA-256, self-signed. Layouts: X.690 (DER), RFC 5280 (certificate), RFC 8017 (RSA), RFC 7468
# (PEM).

COMMON_NAME = 'Octopus Tentacle'
RSA_BITS = 2048
PUBLIC_EXPONENT = 65537
CERTIFICATE_YEARS = 100

_SHA256_DIGEST_INFO = bytes.fromhex(
    '3031300d060960864801650304020105000420'
)  # RFC 8017, 9.2 note 1
_OID_RSA = bytes.fromhex('06092a864886f70d010101')
_OID_SHA256_RSA = bytes.fromhex('06092a864886f70d01010b')
_OID_COMMON_NAME = bytes.fromhex('0603550403')
_DER_NULL = b'\x05\x00'
_SEQUENCE, _SET, _INTEGER, _OCTET_STRING = 0x30, 0x31, 0x02, 0x04


def sha1(data: bytes = b'') -> Any:
    """SHA-1 as the protocol demands it; said not to guard anything, so that FIPS hosts allow it."""
    if sys.version_info >= (3, 9):
        return hashlib.sha1(data, usedforsecurity=False)
    return hashlib.sha1(data)


def thumbprint_of(certificate: bytes) -> str:
    """The SHA-1 of a DER certificate, 40 upper-case hex digits."""
    return sha1(certificate).hexdigest().upper()


def parse_thumbprint(text: str) -> str:
    """A thumbprint as people write it: 40 hex digits (SHA-1) or 64 (SHA-256), upper-case.

    Colons, blanks and the invisible mark that Windows' certificate dialogue copies along are
    dropped. Raises UsageError.
    """
    bare = re.sub('[\\s:\u200e\ufeff]', '', text).upper()
    if not re.match(r'(?:[0-9A-F]{40}|[0-9A-F]{64})\Z', bare):
        raise UsageError(
            '%s is not a thumbprint: 40 hex digits (SHA-1) or 64 (SHA-256) expected, '
            '%d characters came. `tentacle.py show-thumbprint` prints one'
            % (printable(text, 80) or "''", len(bare))
        )
    return bare


def is_pinned(certificate: Optional[bytes], thumbprints: Iterable[str]) -> bool:
    """Whether a DER certificate is among the pinned ones, by SHA-1 or by SHA-256."""
    if not certificate:
        return False
    return not {
        thumbprint_of(certificate),
        hashlib.sha256(certificate).hexdigest().upper(),
    }.isdisjoint(thumbprints)


def _der(tag: int, *contents: bytes) -> bytes:
    content = b''.join(contents)
    size = len(content)
    if size < 0x80:
        return bytes([tag, size]) + content
    length = size.to_bytes((size.bit_length() + 7) // 8, 'big')
    return bytes([tag, 0x80 | len(length)]) + length + content


def _der_integer(number: int) -> bytes:
    return _der(_INTEGER, number.to_bytes(number.bit_length() // 8 + 1, 'big'))


def _der_time(seconds: float) -> bytes:
    """UTCTime up to 2049, GeneralizedTime from then on (RFC 5280, 4.1.2.5)."""
    moment = time.gmtime(seconds)
    if moment.tm_year < 2050:
        return _der(0x17, time.strftime('%y%m%d%H%M%SZ', moment).encode())
    return _der(0x18, time.strftime('%Y%m%d%H%M%SZ', moment).encode())


def _der_items(content: bytes) -> Iterator[Tuple[int, bytes]]:
    """The (tag, content) pairs of a DER sequence's content. Raises ValueError."""
    position = 0
    while position < len(content):
        tag, size = struct.unpack_from('BB', content, position)
        position += 2
        if size & 0x80:
            width = size & 0x7F
            size = int.from_bytes(content[position : position + width], 'big')
            position += width
        if position + size > len(content):
            raise ValueError('DER item of %d bytes runs over the end' % size)
        yield tag, content[position : position + size]
        position += size


class RsaKey(NamedTuple):
    """The numbers of a private key, in the order of PKCS #1 (RFC 8017, A.1.2)."""

    n: int
    e: int
    d: int
    p: int
    q: int

    def to_der(self) -> bytes:
        """PKCS #1 RSAPrivateKey."""
        numbers = (
            0,
            self.n,
            self.e,
            self.d,
            self.p,
            self.q,
            self.d % (self.p - 1),
            self.d % (self.q - 1),
            pow(self.q, self.p - 2, self.p),
        )
        return _der(_SEQUENCE, *map(_der_integer, numbers))

    @classmethod
    def from_der(cls, der: bytes) -> 'RsaKey':
        """From PKCS #1, or PKCS #8 around it. Raises ValueError, struct.error or StopIteration."""
        items = list(_der_items(next(_der_items(der))[1]))
        if items[1][0] == _SEQUENCE:  # PKCS #8: version, algorithm, the key
            return cls.from_der(items[2][1])
        return cls(*(int.from_bytes(content, 'big') for _, content in items[1:6]))

    def sign(self, data: bytes) -> bytes:
        """RSASSA-PKCS1-v1_5 with SHA-256 (RFC 8017, 8.2)."""
        size = (self.n.bit_length() + 7) // 8
        info = _SHA256_DIGEST_INFO + hashlib.sha256(data).digest()
        padded = b'\x00\x01' + b'\xff' * (size - len(info) - 3) + b'\x00' + info
        return pow(int.from_bytes(padded, 'big'), self.d, self.n).to_bytes(size, 'big')


_SMALL_PRIMES = [n for n in range(3, 2000, 2) if all(n % d for d in range(3, int(n**0.5) + 1, 2))]


def _is_probable_prime(candidate: int, rounds: int = 24) -> bool:
    """Miller-Rabin (FIPS 186-4, C.3.1): 24 random bases, where table C.2 asks for 4."""
    if any(candidate % prime == 0 for prime in _SMALL_PRIMES):
        return False
    odd, twos = candidate - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for _ in range(rounds):
        x = pow(secrets.randbelow(candidate - 3) + 2, odd, candidate)
        if x in (1, candidate - 1):
            continue
        for _ in range(twos - 1):
            x = x * x % candidate
            if x == candidate - 1:
                break
        else:
            return False
    return True


def _random_prime(bits: int) -> int:
    while True:
        candidate = (
            secrets.randbits(bits) | (3 << (bits - 2)) | 1
        )  # two top bits: the product has all its bits
        if candidate % PUBLIC_EXPONENT != 1 and _is_probable_prime(candidate):
            return candidate


def generate_rsa_key_in_python() -> RsaKey:
    """A new RSA-2048 key without any program's help: about a second."""
    p = q = _random_prime(RSA_BITS // 2)
    while abs(p - q) >> (RSA_BITS // 2 - 100) == 0:  # FIPS 186-4, B.3.3: not too close
        q = _random_prime(RSA_BITS // 2)
    totient = (p - 1) * (q - 1)
    # The inverse of e: `totient * k + 1` is a multiple of e for k = -1/totient (mod e), and e is
    # prime.
    k = -pow(totient, PUBLIC_EXPONENT - 2, PUBLIC_EXPONENT) % PUBLIC_EXPONENT
    return RsaKey(p * q, PUBLIC_EXPONENT, (totient * k + 1) // PUBLIC_EXPONENT, p, q)


def run_openssl(arguments: Sequence[str], stdin: bytes = b'') -> bytes:
    """Run the host's `openssl` program, secrets on its standard input; its standard output.

    Raises FileNotFoundError where there is none, TentacleError with its last line where it fails.
    """
    import subprocess

    done = subprocess.run(
        ['openssl'] + list(arguments),
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=120,
    )
    if done.returncode != 0:
        said = done.stderr.decode(errors='replace').strip().splitlines() or ['no message']
        raise TentacleError('`openssl %s` failed: %s' % (arguments[0], printable(said[0])))
    return done.stdout


def generate_rsa_key() -> RsaKey:
    """A new RSA-2048 key: by `openssl` (a tenth of a second), else in Python (about a second)."""
    try:
        return RsaKey.from_der(
            run_openssl(
                [
                    'genpkey',
                    '-algorithm',
                    'RSA',
                    '-pkeyopt',
                    'rsa_keygen_bits:%d' % RSA_BITS,
                    '-outform',
                    'DER',
                ]
            )
        )
    except FileNotFoundError:
        logger.info('There is no openssl program here: the key is made in Python')
    except (OSError, TentacleError, ValueError, IndexError, struct.error) as error:
        logger.info('openssl made no key, so it is made in Python: %s', error)
    return generate_rsa_key_in_python()


def self_signed_certificate(key: RsaKey, common_name: str = COMMON_NAME) -> bytes:
    """A DER certificate: version 3, random serial, valid from yesterday for 100 years (RFC 5280,
    4.1).
    """
    algorithm = _der(_SEQUENCE, _OID_SHA256_RSA, _DER_NULL)
    name = _der(
        _SEQUENCE, _der(_SET, _der(_SEQUENCE, _OID_COMMON_NAME, _der(0x0C, common_name.encode())))
    )
    yesterday = time.time() - 86400
    validity = _der(
        _SEQUENCE, _der_time(yesterday), _der_time(yesterday + CERTIFICATE_YEARS * 365.25 * 86400)
    )
    public_key = _der(_SEQUENCE, _der_integer(key.n), _der_integer(key.e))
    public_key_info = _der(
        _SEQUENCE, _der(_SEQUENCE, _OID_RSA, _DER_NULL), _der(0x03, b'\0', public_key)
    )
    serial = secrets.randbits(126) | 1 << 126
    to_be_signed = _der(
        _SEQUENCE,
        _der(0xA0, _der_integer(2)),
        _der_integer(serial),
        algorithm,
        name,
        validity,
        name,
        public_key_info,
    )
    return _der(_SEQUENCE, to_be_signed, algorithm, _der(0x03, b'\0', key.sign(to_be_signed)))


def pem(label: str, der: bytes) -> str:
    text = base64.b64encode(der).decode()
    lines = [text[i : i + 64] for i in range(0, len(text), 64)]
    return '-----BEGIN %s-----\n%s\n-----END %s-----\n' % (label, '\n'.join(lines), label)


def write_private(path: str, data: bytes, mode: int = 0o600) -> None:
    """Replace a file as a whole, readable by its owner alone (or by `mode`); its folder is made,
    for its owner alone, where it is missing. What root writes belongs to the owner of the old file,
    or else of the folder: an agent that runs as that user must read it.

    Raises TentacleError that names the path and the remedy.
    """
    folder = os.path.dirname(path)
    temporary = os.path.join(
        folder, '.%s.%d.%s' % (os.path.basename(path), os.getpid(), secrets.token_hex(4))
    )
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            with open(descriptor, 'wb') as file:
                file.write(data)
                file.flush()
                is_new = not os.path.exists(path)
                details = os.stat(folder or '.' if is_new else path)
                if os.geteuid() == 0 and details.st_uid != 0:
                    os.fchown(file.fileno(), details.st_uid, details.st_gid)
                os.fchmod(file.fileno(), mode)
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise TentacleError(
            '%s can not be written: %s. Choose a folder that this user may write, with --home DIR '
            'or $TENTACLE_HOME' % (path, error.strerror or error)
        )


def first_certificate(pem_text: str) -> bytes:
    """The DER of the first certificate in a PEM text. Raises ValueError."""
    block = re.search('-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----', pem_text, re.S)
    if not block:
        raise ValueError('there is no certificate in it')
    return ssl.PEM_cert_to_DER_cert(block.group())


def _refuse_passphrase() -> str:
    raise TentacleError(
        'its private key is encrypted; decrypt it first: openssl pkey -in FILE -out KEY.pem'
    )


@contextlib.contextmanager
def file_of(content: bytes, inherited: bool = False) -> Iterator[str]:
    """The path of a file with this content that nobody else sees: OpenSSL reads by path alone.
    `inherited`: for a program of ours to open, while this process lives.
    """
    if hasattr(os, 'memfd_create') and os.path.isdir('/proc/self/fd'):
        descriptor = os.memfd_create('tentacle')
        try:
            os.write(descriptor, content)
            yield '/proc/%s/fd/%d' % (os.getpid() if inherited else 'self', descriptor)
        finally:
            os.close(descriptor)
        return
    import tempfile

    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        yield file.name


class Identity:
    """Our own certificate, its private key, and the PEM file that both are from.

    The key is kept, so that what happens to the file does not change who we are until a restart.
    """

    def __init__(self, path: str, content: bytes):
        self.path = path
        self.content = content  #: PEM, the private key included
        self.certificate = first_certificate(content.decode('latin-1'))  #: DER

    @property
    def thumbprint(self) -> str:
        return thumbprint_of(self.certificate)

    @property
    def sha256_thumbprint(self) -> str:
        return hashlib.sha256(self.certificate).hexdigest().upper()

    def load_into(self, context: ssl.SSLContext) -> None:
        """Make it a context's certificate. Raises ssl.SSLError, TentacleError."""
        with file_of(self.content) as path:
            context.load_cert_chain(path, password=_refuse_passphrase)


def load_identity(path: str) -> Identity:
    """Read and check a PEM file with a certificate and its key. Raises TentacleError,
    FileNotFoundError.
    """
    try:
        with open(path, 'rb') as file:
            identity = Identity(path, file.read(1 << 20))
            mode = os.fstat(file.fileno()).st_mode
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.set_ciphers('DEFAULT:@SECLEVEL=1')  # the keys of old installations have 1024 bits
        identity.load_into(context)
    except FileNotFoundError:
        raise
    except (ValueError, OSError, TentacleError) as error:
        raise TentacleError(
            'The certificate file %s can not be used: %s. Restore it, or make a new identity with '
            '`tentacle.py new-certificate` (the other sides must then trust its new thumbprint)'
            % (path, printable(error))
        )
    if stat.S_IMODE(mode) & 0o077:
        logger.warning(
            'The private key in %s is open to other users (mode %04o); close it: chmod 600 %s',
            path,
            stat.S_IMODE(mode),
            path,
        )
    return identity


def create_identity(path: str) -> Identity:
    """Make a new key and certificate and write them to a PEM file (0600)."""
    key = generate_rsa_key()
    text = pem('RSA PRIVATE KEY', key.to_der()) + pem('CERTIFICATE', self_signed_certificate(key))
    write_private(path, text.encode())
    return Identity(path, text.encode())


_PFX_HINT = (
    'it is a PFX file, and there is no openssl program here to read it. Convert it elsewhere: '
    'openssl pkcs12 -in FILE.pfx -nodes -out FILE.pem'
)


def pem_of_pfx(pfx: bytes, password: str) -> str:
    """A PFX file's key and certificate as PEM text, through `openssl`; old ciphers by its legacy
    provider. Raises TentacleError.
    """
    failures = []
    for options in ([], ['-legacy']):
        # The password comes first on standard input, then openssl opens the file by its path.
        with file_of(pfx, inherited=True) as path:
            command = ['pkcs12', '-in', path, '-nodes', '-passin', 'stdin'] + options
            try:
                given = password.encode('utf-8', 'surrogateescape') + b'\n'
                return run_openssl(command, given).decode('latin-1')
            except FileNotFoundError:
                raise TentacleError(_PFX_HINT)
            except TentacleError as error:
                failures.append(str(error))
    raise TentacleError('is it a PFX file, is the password right? %s' % failures[0])


def pfx_of_identity(identity: Identity, password: str) -> bytes:
    """The certificate and its key as a PFX file, through `openssl`. Raises TentacleError."""
    # The key stands on standard input, so the password comes by a file that nobody else sees.
    with file_of(password.encode('utf-8', 'surrogateescape') + b'\n', inherited=True) as path:
        command = ['pkcs12', '-export', '-passout', 'file:' + path, '-name', COMMON_NAME]
        try:
            return run_openssl(command, identity.content)
        except FileNotFoundError:
            raise TentacleError(
                'There is no openssl program here to write a PFX file. Take %s elsewhere, and '
                'there: openssl pkcs12 -export -in FILE.pem -out FILE.pfx' % identity.path
            )


def _pem_of(content: bytes, password: str) -> str:
    """PEM as it is; PFX, or its base64 text, through `openssl`. Raises TentacleError."""
    if b'-----BEGIN ' in content:
        return content.decode('latin-1')
    text = content.lstrip(codecs.BOM_UTF8).strip()
    if re.match(rb'[A-Za-z0-9+/=\s]+\Z', text):
        with contextlib.suppress(ValueError):
            content = base64.b64decode(b''.join(text.split()), validate=True)
    return pem_of_pfx(content, password)


def _identity_pem(text: str) -> str:
    """The private key and the certificates of a PEM text alone. Raises TentacleError."""
    found = re.finditer(r'-----BEGIN ([A-Z0-9 ]+)-----.*?-----END \1-----', text, re.S)
    blocks = [(match.group(1), match.group()) for match in found]
    keys = [block for label, block in blocks if label.endswith('PRIVATE KEY')]
    certificates = [block for label, block in blocks if label == 'CERTIFICATE']
    if not keys or not certificates:
        raise TentacleError(
            'a private key and its certificate are needed, and it has: %s'
            % (', '.join(label for label, _ in blocks) or 'neither')
        )
    return '\n'.join(keys + certificates) + '\n'


def keep_identity(
    content: bytes, path: str, source: str, password: str = '', expected: str = ''
) -> Identity:
    """The same of a file's content; `source` is what errors name, `expected` the thumbprint that it
    must have.
    """
    # Checked beside the real one, so that a bad file leaves the identity as it was.
    trial = '%s.%s.import' % (path, secrets.token_hex(4))
    try:
        text = _identity_pem(_pem_of(content, password))
        write_private(trial, text.encode('latin-1'))
        found = load_identity(trial).thumbprint
        if expected not in ('', found):
            raise TentacleError('its thumbprint is %s, and %s is expected' % (found, expected))
        os.replace(trial, path)
    except TentacleError as error:
        with contextlib.suppress(OSError):
            os.unlink(trial)
        reason = str(error)
        if reason.startswith('The certificate file '):
            reason = reason.partition(': ')[2].partition('. Restore it')[0]
        raise TentacleError('%s can not be used: %s' % (source, reason))
    return load_identity(path)


def import_identity(source: str, path: str, password: str = '') -> Identity:
    """Make the key and certificate of a PEM or PFX file, or of a PFX file's base64 text, our
    identity. Raises TentacleError.
    """
    try:
        with open(source, 'rb') as file:
            content = file.read(1 << 20)
    except OSError as error:
        raise TentacleError('%s can not be read: %s' % (source, error.strerror))
    return keep_identity(content, path, source, password)


# AES (FIPS 197), for files of a script that come with an `EncryptionPassword`, and for the secrets
# in a settings file of the original.


def _make_sbox() -> bytes:
    """FIPS 197, 5.1.1: the inverse in GF(2^8), by powers of its generator 3, and an affine map."""
    powers, value = [], 1
    for _ in range(255):
        powers.append(value)
        value ^= (value << 1) ^ (0x11B if value & 0x80 else 0)
    inverse = {power: powers[-i % 255] for i, power in enumerate(powers)}
    inverse[0] = 0
    box = []
    for byte in range(256):
        x = inverse[byte]
        spread = x ^ x << 1 ^ x << 2 ^ x << 3 ^ x << 4
        box.append((spread ^ spread >> 8) & 0xFF ^ 0x63)
    return bytes(box)


class Aes:
    """AES with a key of 16 or 32 bytes, by the tables that join SubBytes and MixColumns."""

    def __init__(self, key: bytes):
        self._sbox = sbox = _make_sbox()
        self._inverse = bytes(sbox.index(x) for x in range(256))
        double = [x << 1 ^ (0x11B if x & 0x80 else 0) for x in sbox]
        table = [(d << 24 | x << 16 | x << 8 | (d ^ x)) for x, d in zip(sbox, double)]
        self._tables = [
            [x >> 8 * i | x << 32 - 8 * i & 0xFFFFFFFF for x in table] for i in range(4)
        ]
        self._rounds = self._expand(key)

    def _expand(self, key: bytes) -> List[Tuple[int, ...]]:
        """The key of each round, as four words (FIPS 197, 5.2)."""
        size = len(key) // 4
        words = list(struct.unpack('>%dI' % size, key))
        constant = 1
        while len(words) < 4 * (size + 7):
            word = words[-1]
            if len(words) % size == 0:
                word = self._substitute(word << 8 & 0xFFFFFFFF | word >> 24) ^ constant << 24
                constant = constant << 1 ^ (0x11B if constant & 0x80 else 0)
            elif size > 6 and len(words) % size == 4:
                word = self._substitute(word)
            words.append(words[-size] ^ word)
        return [tuple(words[i : i + 4]) for i in range(0, len(words), 4)]

    def _substitute(self, word: int) -> int:
        return int.from_bytes(word.to_bytes(4, 'big').translate(self._sbox), 'big')

    def encrypt_block(self, block: bytes) -> bytes:
        """16 bytes as 16 others."""
        t0, t1, t2, t3 = self._tables
        a, b, c, d = (word ^ key for word, key in zip(struct.unpack('>4I', block), self._rounds[0]))
        for k0, k1, k2, k3 in self._rounds[1:-1]:
            a, b, c, d = (
                t0[a >> 24] ^ t1[b >> 16 & 255] ^ t2[c >> 8 & 255] ^ t3[d & 255] ^ k0,
                t0[b >> 24] ^ t1[c >> 16 & 255] ^ t2[d >> 8 & 255] ^ t3[a & 255] ^ k1,
                t0[c >> 24] ^ t1[d >> 16 & 255] ^ t2[a >> 8 & 255] ^ t3[b & 255] ^ k2,
                t0[d >> 24] ^ t1[a >> 16 & 255] ^ t2[b >> 8 & 255] ^ t3[c & 255] ^ k3,
            )
        mixed = (
            a & 0xFF000000 | b & 0xFF0000 | c & 0xFF00 | d & 0xFF,
            b & 0xFF000000 | c & 0xFF0000 | d & 0xFF00 | a & 0xFF,
            c & 0xFF000000 | d & 0xFF0000 | a & 0xFF00 | b & 0xFF,
            d & 0xFF000000 | a & 0xFF0000 | b & 0xFF00 | c & 0xFF,
        )
        return struct.pack(
            '>4I', *[self._substitute(word) ^ key for word, key in zip(mixed, self._rounds[-1])]
        )

    def decrypt_block(self, block: bytes) -> bytes:
        """The inverse of `encrypt_block` (FIPS 197, 5.3)."""
        words = [a ^ b for a, b in zip(struct.unpack('>4I', block), self._rounds[-1])]
        for keys in self._rounds[-2::-1]:
            state = struct.pack('>4I', *words)
            state = bytes(state[(i - 4 * (i % 4)) % 16] for i in range(16))  # InvShiftRows
            substituted = struct.unpack('>4I', state.translate(self._inverse))
            words = [a ^ b for a, b in zip(substituted, keys)]
            if keys is not self._rounds[0]:
                words = [self._unmixed(word) for word in words]
        return struct.pack('>4I', *words)

    def _unmixed(self, word: int) -> int:
        """InvMixColumns of one column: MixColumns three times, since four times is none."""
        for _ in range(3):
            t0, t1, t2, t3 = self._tables
            a, b, c, d = word.to_bytes(4, 'big').translate(self._inverse)
            word = t0[a] ^ t1[b] ^ t2[c] ^ t3[d]
        return word


def _padded(data: bytes) -> bytes:
    """With 1 to 16 bytes that say how many they are (PKCS #7)."""
    count = 16 - len(data) % 16
    return data + bytes([count]) * count


def _xor(one: bytes, other: bytes) -> bytes:
    return (int.from_bytes(one, 'big') ^ int.from_bytes(other, 'big')).to_bytes(16, 'big')


class MachineKey(NamedTuple):
    """What the original encrypts secrets of a settings file with: AES-256-CBC, base64."""

    key: bytes
    iv: bytes

    def encrypt(self, text: str) -> str:
        aes, previous, blocks = Aes(self.key), self.iv, []
        data = _padded(text.encode())
        for at in range(0, len(data), 16):
            previous = aes.encrypt_block(_xor(data[at : at + 16], previous))
            blocks.append(previous)
        return base64.b64encode(b''.join(blocks)).decode()

    def decrypt(self, text: str) -> str:
        """Raises ValueError when it was encrypted by another key."""
        data = base64.b64decode(text, validate=True)
        if not data or len(data) % 16:
            raise ValueError('%d bytes are no whole number of blocks' % len(data))
        aes, previous, plain = Aes(self.key), self.iv, b''
        for at in range(0, len(data), 16):
            plain += _xor(aes.decrypt_block(data[at : at + 16]), previous)
            previous = data[at : at + 16]
        if _padded(plain[: -plain[-1]]) != plain:
            raise ValueError('the padding is wrong')
        return plain[: -plain[-1]].decode()


#: Where the original has its machine key from, in this order.
MACHINE_ID_PATH = '/etc/machine-id'
MACHINE_KEY_PATH = '/etc/octopus/machinekey'
_MACHINE_ID_IV = b'743677397A244326'


def machine_keys() -> List[MachineKey]:
    """Those of this host, the first being the one to encrypt with."""
    keys = []
    with contextlib.suppress(OSError), open(MACHINE_ID_PATH, 'rb') as file:
        machine_id = file.readline(100).strip()
        if len(machine_id) == 32:
            keys.append(MachineKey(machine_id, _MACHINE_ID_IV))
    with contextlib.suppress(OSError, ValueError), open(MACHINE_KEY_PATH, 'rb') as file:
        key, iv = (base64.b64decode(part, validate=True) for part in file.read(1000).split(b'.'))
        if (len(key), len(iv)) == (32, 16):
            keys.append(MachineKey(key, iv))
    return keys


def protect(text: str) -> str:
    """A secret as it stands in a settings file, where none is ''; a host without a machine key gets
    one. Raises TentacleError.
    """
    if not text:
        return ''
    keys = machine_keys()
    if not keys:
        keys = [MachineKey(secrets.token_bytes(32), secrets.token_bytes(16))]
        write_private(MACHINE_KEY_PATH, b'.'.join(map(base64.b64encode, keys[0])))
    return keys[0].encrypt(text)


def unprotect(text: str, what: str) -> str:
    """The same back. Raises TentacleError, in which the secret does not stand."""
    for key in machine_keys():
        with contextlib.suppress(ValueError):
            return key.decrypt(text)
    raise TentacleError(
        '%s was encrypted with the key of another machine: neither %s nor %s fits it. Restore that '
        'file, or set it anew' % (what, MACHINE_ID_PATH, MACHINE_KEY_PATH)
    )


def encrypt_script_file(source: BinaryIO, target: BinaryIO, password: str) -> None:
    """Copy a file as the original keeps sensitive ones: `IV__`, IV, AES-128-CBC (wire notes 4)."""
    source = io.BufferedReader(source)  # type: ignore[arg-type]
    aes = Aes(hashlib.pbkdf2_hmac('sha1', password.encode(), b'Octopuss', 1000, 16))
    previous = secrets.token_bytes(16)
    target.write(b'IV__' + previous)
    block = b'?' * 16
    while len(block) == 16:
        block = source.read(16)
        padded = block if len(block) == 16 else _padded(block)
        previous = aes.encrypt_block(_xor(padded, previous))
        target.write(previous)


# ---- 5. Secure streams ---------------------------------------------------------------------------
# TLS where no CA, name, date or purpose counts, but the thumbprint alone (wire notes 1 and 5).

#: Forward-secret suites alone, CBC last (Windows Server 2012 R2 has no ECDHE-RSA with GCM); the
#: level is for the 1024-bit and SHA-1 certificates of old installations that are still pinned in
#: the field.
CIPHERS = (
    'ECDHE+AESGCM:ECDHE+CHACHA20:DHE+AESGCM:ECDHE+AES256+SHA384:ECDHE+AES128+SHA256:@SECLEVEL=1'
)

_VERIFY_FLAGS = (
    0x80000  # X509_V_FLAG_PARTIAL_CHAIN: the pinned certificate is the root
    | 0x200000  # X509_V_FLAG_NO_CHECK_TIME
    | 0x10
)  # X509_V_FLAG_IGNORE_CRITICAL
_OP_NO_RX_CERTIFICATE_COMPRESSION = (
    1 << 33
)  # OpenSSL 3.2 on: a compressed certificate passes the callback unseen
#: Auxiliary data of OpenSSL's TRUSTED CERTIFICATE: good for client authentication, whatever it says
#: of itself.
_TRUSTED_FOR_CLIENT_AUTH = bytes.fromhex('300c300a06082b06010505070302')
_CONTENT_HANDSHAKE, _MESSAGE_CERTIFICATE = 22, 11


_TCP_QUICKACK = getattr(socket, 'TCP_QUICKACK', None)


def _hang_up(sock: socket.socket) -> None:
    """Wake whoever waits on a socket, from another thread; TLS is left aside, since it is in their
    hands.
    """
    try:
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
    except OSError:
        pass  # it was not connected any more


def _tls_context(protocol: int, identity: Optional[Identity]) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS)
    if identity is not None:
        identity.load_into(context)
    return context


def _certificate_of_message(body: bytes, version: int) -> Optional[bytes]:
    """The first DER certificate in a TLS Certificate message with its 4-byte header (RFC 5246,
    8446).
    """
    position = 4
    if len(body) < 11:
        return None
    if version == ssl.TLSVersion.TLSv1_3:
        position += 1 + body[position]  # certificate_request_context
    position += 3  # length of the list
    size = int.from_bytes(body[position : position + 3], 'big')
    return bytes(body[position + 3 : position + 3 + size]) or None


def _add_to_store(context: ssl.SSLContext, certificate: bytes) -> None:
    """Put a pinned certificate into a context's store as one trusted for client authentication;
    only a file can carry the auxiliary data for that.
    """
    text = pem('TRUSTED CERTIFICATE', certificate + _TRUSTED_FOR_CLIENT_AUTH)
    with file_of(text.encode()) as path:
        context.load_verify_locations(cafile=path)


class SocketStream:
    """Bytes over a connected socket. Used by one thread at a time.

    Errors of I/O come out as ConnectionLost; `timeout` (seconds) bounds each wait for the peer.
    """

    certificate: Optional[bytes] = None  #: DER, None: the peer showed none

    def __init__(self, sock: socket.socket, peer: str):
        self.peer = peer  #: address for logs
        self._sock = sock
        self._leftover = b''
        self._deadline: Optional[float] = None
        self.on_close: Callable[[], None] = lambda: None
        self.idle_since = 0.0  #: of `time.monotonic`, while its peer has no call under way

    def fileno(self) -> int:
        """For `selectors`."""
        return self._sock.fileno()

    def set_timeout(self, seconds: float) -> None:
        """Bound each single wait from now on."""
        self._deadline = None
        self._sock.settimeout(seconds)

    def set_deadline(self, moment: float) -> None:
        """Bound all that is read from now on, together, by a moment of `time.monotonic`."""
        self._deadline = moment

    def _receive(self, receive: Callable[..., Any], what: Any) -> Any:
        try:
            if self._deadline is not None:
                left = self._deadline - time.monotonic()
                if left <= 0:
                    raise socket.timeout
                self._sock.settimeout(left)
            return receive(what)
        except OSError as error:
            raise self._lost(error)

    def _lost(self, error: OSError) -> TentacleError:
        if isinstance(error, socket.timeout):
            return ConnectionLost('%s: its time is over, nothing more came or went' % self.peer)
        reason = getattr(error, 'reason', None) or error.strerror or str(error)
        if 'ALERT' in reason and (
            'CERT' in reason or 'UNKNOWN_CA' in reason or 'ACCESS_DENIED' in reason
        ):
            return UntrustedThumbprint('%s refuses our certificate' % self.peer)
        return ConnectionLost('%s: the connection broke (%s)' % (self.peer, printable(reason)))

    def read_some(self, most: int = 1 << 16) -> bytes:
        """What there is, up to `most` bytes; waits for the first; b'' at the end of the stream."""
        if self._leftover:
            some, self._leftover = self._leftover[:most], self._leftover[most:]
            return some
        return self._receive(self._sock.recv, most)

    def read_into(self, view: memoryview) -> None:
        """Fill a buffer. Raises ConnectionLost when the stream ends before it is full."""
        filled = 0
        if self._leftover:
            some = self.read_some(len(view))
            filled = len(some)
            view[:filled] = some
        self._receive(self._fill, view[filled:])

    def _fill(self, view: memoryview) -> None:
        """One TLS record a turn, so there is nothing in here that needs not be."""
        receive = self._sock.recv_into
        while view:
            count = receive(view)
            if not count:
                raise ConnectionLost(
                    '%s closed the connection in the middle of a data stream' % self.peer
                )
            view = view[count:]

    def read_exactly(self, count: int) -> bytes:
        parts = []
        while count:
            part = self.read_some(count)
            if not part:
                raise ConnectionLost(
                    '%s closed the connection %d bytes too early' % (self.peer, count)
                )
            parts.append(part)
            count -= len(part)
        return b''.join(parts)

    def read_until(self, ends: Callable[[bytes], int], limit: int) -> Optional[bytes]:
        """Bytes up to the position that `ends(bytes so far)` finds (0: not yet); the rest stays
        unread.

        None when the stream ends ahead of it. Raises ProtocolError over `limit` bytes,
        ConnectionLost when it ends within.
        """
        held = b''
        while True:
            some = self.read_some(4096)
            if not some and held:
                raise ConnectionLost('%s closed the connection in the middle of a line' % self.peer)
            if not some:
                return None
            held += some
            end = ends(held)
            if end and end <= limit:
                self.unread(held[end:])
                return held[:end]
            if len(held) > limit:
                raise ProtocolError(
                    '%s sent more than %d characters where a line was expected' % (self.peer, limit)
                )

    def read_line(self, limit: int) -> Optional[str]:
        """A line ended by CR LF, without its end; None at the end of the stream (wire notes 1)."""
        line = self.read_until(lambda held: held.find(b'\r\n') + 2 if b'\r\n' in held else 0, limit)
        if line is None:
            return None
        if b'\r' in line[:-2]:
            raise ProtocolError('%s sent a CR without LF in a control line' % self.peer)
        return line[:-2].decode('latin-1')

    def unread(self, data: bytes) -> None:
        """Give back what was read too much."""
        self._leftover = data + self._leftover

    def write(self, data: bytes) -> None:
        try:
            self._sock.sendall(data)
        except OSError as error:
            raise self._lost(error)

    def has_more(self) -> bool:
        """Whether something came that was not read, be it the end."""
        if self._leftover:
            return True
        with selectors.PollSelector() as selector:
            selector.register(self._sock, selectors.EVENT_READ)
            return bool(selector.select(0))

    def has_line(self) -> bool:
        """Whether a whole control line came, or the end; never waits."""
        self._sock.settimeout(0)
        try:
            some = self._sock.recv(4096)
        except (BlockingIOError, ssl.SSLWantReadError):
            return False
        except OSError as error:
            raise self._lost(error)
        self._leftover += some
        return not some or b'\r\n' in self._leftover.lstrip(b'\r\n')  # empty ones do not count

    def hang_up(self) -> None:
        """End the connection under whoever waits for it. Any thread may call."""
        _hang_up(self._sock)

    def close(self) -> None:
        self._sock.close()
        self.on_close()


class SecureStream(SocketStream):
    """Bytes over a TLS connection to a known peer."""

    def __init__(self, sock: ssl.SSLSocket, peer: str):
        super().__init__(sock, peer)
        self.certificate = sock.getpeercert(binary_form=True)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def thumbprint(self) -> Optional[str]:
        return thumbprint_of(self.certificate) if self.certificate else None

    def _receive(self, receive: Callable[..., Any], what: Any) -> Any:
        if _TCP_QUICKACK is not None:
            # A peer with Nagle's algorithm holds back its next small write until this one is
            # acknowledged; the option wears off, so it is set for each wait (wire notes 1).
            with contextlib.suppress(OSError):
                self._sock.setsockopt(socket.IPPROTO_TCP, _TCP_QUICKACK, 1)
        return super()._receive(receive, what)

    def close(self) -> None:
        """Say goodbye, without waiting for an answer, and close."""
        try:
            self._sock.settimeout(0)
            self._sock.unwrap()  # type: ignore[attr-defined]
        except (OSError, ValueError):
            pass  # the peer's goodbye has not come: no matter
        super().close()


class PinningAcceptor:
    """The accepting side's TLS: lets through pinned peers, and peers that show no certificate at
    all.

    `ssl` has no verify callback; its message callback sees the peer's certificate before OpenSSL
    judges it, and puts it into the context's store if, and only if, it is pinned. Any thread may
    call.
    """

    def __init__(self, identity: Identity, trusted: Callable[[], FrozenSet[str]]):
        if not hasattr(ssl.SSLContext, '_msg_callback'):
            raise TentacleError(
                'The ssl module of this Python (%s) can not show us a peer\'s certificate; '
                'CPython 3.8 or later is needed to listen' % sys.version.split()[0]
            )
        self._identity = identity
        self._trusted = trusted
        self._lock = threading.Lock()
        self._quiet_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context = self._new_context()
        self._context_trusts: FrozenSet[str] = frozenset()

    def _new_context(self) -> ssl.SSLContext:
        context = _tls_context(ssl.PROTOCOL_TLS_SERVER, self._identity)
        context.verify_mode = ssl.CERT_OPTIONAL
        context.verify_flags |= _VERIFY_FLAGS
        # A resumed session carries no certificate message, so there are none.
        context.options |= ssl.OP_NO_TICKET
        context.num_tickets = 0
        in_store = set()
        if ssl.OPENSSL_VERSION_INFO >= (3, 2):
            context.options |= _OP_NO_RX_CERTIFICATE_COMPRESSION

        def see(
            connection: Any, direction: str, version: int, content: int, kind: int, body: bytes
        ) -> None:
            if direction != 'read' or content != _CONTENT_HANDSHAKE or kind != _MESSAGE_CERTIFICATE:
                return
            certificate = _certificate_of_message(body, version)
            if certificate:
                connection.seen_thumbprint = thumbprint_of(certificate)
                if certificate not in in_store and is_pinned(certificate, self._trusted()):
                    _add_to_store(context, certificate)
                    in_store.add(certificate)

        context._msg_callback = see
        return context

    def _current_context(self, trusted: FrozenSet[str]) -> ssl.SSLContext:
        """A store never forgets: when trust was taken away, a new context takes the place of the
        old.
        """
        with self._lock:
            if self._context_trusts - trusted:
                self._context = self._new_context()
            self._context_trusts = trusted
            return self._context

    def trusts(self, stream: SecureStream) -> bool:
        """Whether a peer is still pinned: between its handshake and its greeting is time enough."""
        return is_pinned(stream.certificate, self._trusted())

    def wrap(self, sock: socket.socket) -> ssl.SSLSocket:
        """The socket as a TLS one that has not shaken hands; no I/O."""
        return self._current_context(self._trusted()).wrap_socket(
            sock, server_side=True, do_handshake_on_connect=False
        )

    def handshake(self, sock: ssl.SSLSocket, peer: str, timeout: float) -> SecureStream:
        """Shake hands within `timeout` seconds.

        Raises UntrustedThumbprint (with the thumbprint that was seen), ConnectionLost.
        """
        sock.settimeout(timeout)
        try:
            sock.do_handshake()
            # The message callback has done its work; it would go on to see every record.
            sock.context = self._quiet_context
            stream = SecureStream(sock, peer)
        except OSError as error:
            seen = getattr(sock, 'seen_thumbprint', None)
            if seen in self._trusted():
                raise ConnectionLost(
                    'the thumbprint %s is trusted, but the handshake failed (%s)'
                    % (seen, printable(getattr(error, 'verify_message', None) or error))
                )
            if getattr(error, 'reason', None) == 'CERTIFICATE_VERIFY_FAILED' and seen:
                raise UntrustedThumbprint('the thumbprint %s is not trusted' % seen, seen)
            if isinstance(error, socket.timeout):
                raise ConnectionLost('no TLS handshake within %g s' % timeout)
            raise ConnectionLost(
                'the TLS handshake failed (%s)' % printable(getattr(error, 'reason', None) or error)
            )
        # The decision is made here; the callback only helped a pinned certificate through OpenSSL.
        if stream.certificate and not is_pinned(stream.certificate, self._trusted()):
            raise UntrustedThumbprint(
                'the thumbprint %s is not trusted' % stream.thumbprint, stream.thumbprint
            )
        return stream


# ---- 6. Proxies and dialling ---------------------------------------------------------------------

LISTENING_PORT = 10933
POLLING_PORT = 10943


def _host_and_port(address: Tuple[Any, ...]) -> str:
    host = str(address[0])
    if host.startswith('::ffff:') and '.' in host:
        host = host[len('::ffff:') :]  # IPv4 on the IPv6 socket
    return '%s:%d' % ('[%s]' % host if ':' in host else host, address[1])


class Proxy(NamedTuple):
    """An HTTP proxy that tunnels by CONNECT."""

    host: str
    port: int
    user: str = ''
    password: Secret = Secret()

    def __str__(self) -> str:
        return _host_and_port((self.host, self.port))


class ServiceEndPoint(NamedTuple):
    """Where a tentacle is, and the thumbprint it must show (None: not pinned, so never called)."""

    uri: str  # https://host:port/, or poll://subscription/
    thumbprint: Optional[str] = None
    proxy: Optional[Proxy] = None  # to go through
    queue_timeout: float = LIMITS.queue  # seconds until a polling tentacle must fetch a call

    @property
    def is_polling(self) -> bool:
        return self.uri.startswith('poll://')

    @property
    def address(self) -> Tuple[str, int]:
        """(host, port) of an https URI."""
        host, _, port = self.uri[len('https://') :].rstrip('/').rpartition(':')
        return host.strip('[]'), int(port)


def parse_subscription(text: str) -> str:
    """`poll://NAME/`, in lower case as every peer's URI has it. Raises UsageError."""
    match = re.match(r'poll://([A-Za-z0-9._-]{1,100})/?\Z', text)
    if not match:
        raise UsageError(
            '%s is no subscription: poll://NAME/ expected, of letters, digits, - and _'
            % printable(text)
        )
    return 'poll://%s/' % match.group(1).lower()


def parse_target_uri(text: str, default_port: int = LISTENING_PORT) -> str:
    """`host`, `host:port`, `[v6]:port`, a bare IPv6 address or an https URL as
    `https://host:port/`; a `poll://subscription` with its slash.

    Raises UsageError.
    """
    if text.startswith('poll://'):
        return parse_subscription(text)
    match = re.match(
        r'(?:https://)?(?:\[([0-9A-Fa-f:.%\w]+)\]|([^\s/:@\[\]]+))(?::(\d{1,5}))?/?\Z', text
    )
    if not match and re.match(r'[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*\Z', text):
        return 'https://[%s]:%d/' % (text.lower(), default_port)
    if not match or not 0 < int(match.group(3) or default_port) < 65536:
        raise UsageError(
            '%s is not a target: HOST, HOST:PORT, https://HOST:PORT/ or poll://SUBSCRIPTION/ '
            'expected' % printable(text)
        )
    host = '[%s]' % match.group(1).lower() if match.group(1) else match.group(2).lower()
    return 'https://%s:%s/' % (host, match.group(3) or default_port)


def new_subscription() -> str:
    """20 random letters and digits, as the original makes them."""
    alphabet = 'abcdefghijklmnopqrstuvwxyz0123456789'
    return 'poll://%s/' % ''.join(secrets.choice(alphabet) for _ in range(20))


def parse_proxy(text: str, password: Optional[str] = None) -> Proxy:
    """`http://[user:password@]host[:port]`; a password given apart takes precedence.

    Raises UsageError, in which no password stands.
    """
    from urllib.parse import unquote, urlsplit

    try:
        parts = urlsplit(text if '://' in text else 'http://' + text)
        port = 80 if parts.port is None else parts.port
    except ValueError:
        parts, port = urlsplit(''), 0
    rest = parts.path.strip('/') + parts.query + parts.fragment
    if parts.scheme != 'http' or not parts.hostname or rest or not port:
        raise UsageError(
            'that is no proxy that can be used: http://[USER:PASSWORD@]HOST:PORT expected%s'
            % (', not https' if parts.scheme == 'https' else '')
        )
    return Proxy(
        parts.hostname,
        port,
        unquote(parts.username or ''),
        Secret(unquote(parts.password or '') if password is None else password),
    )


def _is_exempt(host: str, port: int, no_proxy: str) -> bool:
    """Whether NO_PROXY names a host: by name, suffix, address, CIDR or `*`; `:port` may follow."""
    import ipaddress

    def address_of(text: str) -> Any:
        try:
            return ipaddress.ip_address(text)
        except ValueError:
            return None

    address = address_of(host)
    for entry in re.split(r'[\s,]+', no_proxy.lower()):
        name, colon, only_port = entry.rpartition(':')
        if colon and only_port.isdecimal() and address_of(entry) is None:
            if int(only_port) != port:
                continue
            entry = name
        if entry == '*':
            return True
        if address is None:
            domain = entry.lstrip('*.')
            if domain and ('.' + host.lower()).endswith('.' + domain):
                return True
        else:
            with contextlib.suppress(ValueError):
                if address in ipaddress.ip_network(entry.strip('[]'), strict=False):
                    return True
    return False


def proxy_of_environment(uri: str, environment: Mapping[str, str] = os.environ) -> Optional[Proxy]:
    """The proxy that `HTTPS_PROXY` or `ALL_PROXY` name for an https URI, minus `NO_PROXY`; lower
    case first, as curl has it. Raises UsageError.
    """

    def value_of(name: str) -> str:
        return environment.get(name.lower()) or environment.get(name) or ''

    for name in ('HTTPS_PROXY', 'ALL_PROXY'):
        text = value_of(name)
        if text and not _is_exempt(*ServiceEndPoint(uri).address, value_of('NO_PROXY')):
            try:
                return parse_proxy(text)
            except UsageError as error:
                raise UsageError('$%s: %s' % (name, error))
    return None


def _keep_alive(sock: socket.socket) -> None:
    """TCP keep-alive as the original has it (wire notes 2), as far as this system can be told; and
    the same patience with bytes that nobody acknowledges, of which keep-alive does not speak.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ('TCP_KEEPIDLE', 15),
        ('TCP_KEEPINTVL', 5),
        ('TCP_KEEPCNT', 10),
        ('TCP_USER_TIMEOUT', 65000),
    ):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _dial(host: str, port: int, what: str, limits: Limits) -> socket.socket:
    """A TCP connection. Raises NotDelivered with the plain reason."""
    peer = _host_and_port((host, port))
    try:
        sock = socket.create_connection((host, port), limits.connect)
    except (socket.gaierror, UnicodeError) as error:
        raise NotDelivered(
            '%s does not resolve: %s. Check the name' % (host, getattr(error, 'strerror', error))
        )
    except socket.timeout:
        raise NotDelivered(
            '%s does not answer within %g s: is the host up, is a firewall in between?'
            % (peer, limits.connect)
        )
    except ConnectionRefusedError:
        raise NotDelivered('%s refuses connections: is a %s listening on that port?' % (peer, what))
    except OSError as error:
        raise NotDelivered('%s can not be reached: %s' % (peer, error.strerror or error))
    _keep_alive(sock)
    return sock


def _connect_request(proxy: Proxy, target: str) -> bytes:
    """The original's request, byte for byte (wire notes 1)."""
    lines = ['CONNECT %s HTTP/1.0' % target, 'Host: %s' % target]
    if proxy.user or proxy.password:
        user = ('%s:' % proxy.user).encode('utf-8', 'surrogateescape')
        credentials = user + proxy.password.encode('utf-8', 'surrogateescape')
        lines.append('Proxy-Authorization: Basic ' + base64.b64encode(credentials).decode())
    return ('\r\n'.join(lines) + '\r\n\r\n').encode()


def _read_proxy_answer(sock: socket.socket, proxy: Proxy, limits: Limits) -> int:
    """The status of a proxy's answer; what follows its blank line stays unread.

    Raises NotDelivered.
    """
    deadline = time.monotonic() + limits.connect
    answer = b''
    while not re.search(rb'\n\r?\n\Z', answer):
        sock.settimeout(max(deadline - time.monotonic(), 0.001))
        byte = sock.recv(1)  # the tunnel's first byte may come right behind
        if not byte:
            raise NotDelivered(
                'The proxy %s closes the connection without an answer to CONNECT: is it an HTTP '
                'proxy, may this host use it?' % str(proxy)
            )
        answer += byte
        if not b'HTTP/'.startswith(answer[:5]) or len(answer) > limits.proxy_answer:
            raise NotDelivered(
                'What answers at %s is no HTTP proxy (it says %s): check its host and port'
                % (proxy, printable(answer[:40].decode('latin-1')))
            )
    match = re.match(rb'HTTP/1\.\d (\d{3})\b', answer)
    if not match:
        raise NotDelivered(
            'The proxy %s answers CONNECT with %s, where HTTP/1.0 200 or the like was expected'
            % (proxy, printable(answer.split(b'\n')[0].decode('latin-1').strip(), 60))
        )
    return int(match.group(1))


def _open_tunnel(sock: socket.socket, proxy: Proxy, target: str, limits: Limits) -> None:
    """Ask a proxy for a tunnel to `host:port` (wire notes 1). Raises NotDelivered, each refusal
    with its next step, and without a password.
    """
    try:
        sock.settimeout(limits.connect)
        sock.sendall(_connect_request(proxy, target))
        status = _read_proxy_answer(sock, proxy, limits)
    except socket.timeout:
        raise NotDelivered(
            'The proxy %s takes connections, but does not answer CONNECT %s within %g s: is it an '
            'HTTP proxy, can it reach that host?' % (proxy, target, limits.connect)
        )
    except OSError as error:
        raise NotDelivered(
            'The proxy %s broke the connection (%s): is it an HTTP proxy, may this host use it?'
            % (proxy, error.strerror or error)
        )
    if status == 200:
        return
    if status in (401, 407):
        reason = (
            'refuses user %s (%d): check the user and the password' % (proxy.user, status)
            if proxy.user
            else 'wants a user and a password (%d): --proxy http://USER@HOST:PORT with '
            '--proxy-password-file' % status
        )
    elif status == 403:
        reason = 'does not allow CONNECT to %s (403): its administrator can permit it' % target
    elif status in (500, 502, 503, 504):
        reason = 'can not reach %s (%d): check that name and port, as the proxy sees them' % (
            target,
            status,
        )
    else:
        reason = (
            'answers CONNECT %s with status %d, where 200 was expected: is it an HTTP proxy, and '
            'may that port be reached through it?' % (target, status)
        )
    raise NotDelivered('The proxy %s %s' % (proxy, reason))


@functools.lru_cache(maxsize=4)
def _client_context(identity: Optional[Identity]) -> ssl.SSLContext:
    """Kept, since to make one takes as long as to shake hands."""
    context = _tls_context(ssl.PROTOCOL_TLS_CLIENT, identity)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def dial_tls(
    uri: str, identity: Optional[Identity], limits: Limits = LIMITS, proxy: Optional[Proxy] = None
) -> SecureStream:
    """Connect to an https URI and shake hands; the peer's certificate is not judged yet. Without
    an identity we show no certificate.

    Raises NotDelivered with the plain reason, UntrustedThumbprint when the peer refuses ours.
    """
    host, port = ServiceEndPoint(uri).address
    peer = _host_and_port((host, port))
    if proxy is None:
        sock = _dial(host, port, 'tentacle or a server', limits)
    else:
        sock = _dial(proxy.host, proxy.port, 'proxy', limits)
    context = _client_context(identity)
    try:
        if proxy is not None:
            _open_tunnel(sock, proxy, peer, limits)
            peer += ' (through the proxy %s)' % str(proxy)
        sock.settimeout(limits.handshake)
        return SecureStream(context.wrap_socket(sock, server_hostname=host), peer)
    except TentacleError:
        sock.close()
        raise
    except UnicodeError as error:
        sock.close()
        raise NotDelivered('%s is no name of a host: %s' % (printable(host), error))
    except OSError as error:
        sock.close()
        reason = getattr(error, 'reason', None) or error.strerror or str(error)
        if isinstance(error, socket.timeout):
            raise NotDelivered(
                '%s accepts connections, but no TLS handshake came within %g s: is it a tentacle?'
                % (peer, limits.handshake)
            )
        raise NotDelivered(
            '%s does not speak the TLS we need (%s): is it a tentacle?' % (peer, printable(reason))
        )


def connect(
    endpoint: ServiceEndPoint,
    identity: Identity,
    limits: Limits = LIMITS,
    trusted: Optional[FrozenSet[str]] = None,
) -> SecureStream:
    """A stream to the peer that the endpoint names; not a byte goes to any other. `trusted`, where
    there is more than one thumbprint that it may show.

    Raises NotDelivered, UntrustedThumbprint.
    """
    stream = dial_tls(endpoint.uri, identity, limits, endpoint.proxy)
    pinned = [endpoint.thumbprint] if endpoint.thumbprint else []
    if is_pinned(stream.certificate, pinned if trusted is None else trusted):
        return stream
    stream.close()
    if trusted is not None:
        raise UntrustedThumbprint(
            '%s shows the thumbprint %s, which is not trusted' % (stream.peer, stream.thumbprint),
            stream.thumbprint,
        )
    raise UntrustedThumbprint(
        'THE IDENTITY OF %s IS NOT THE PINNED ONE: expected thumbprint %s, it shows %s. Either its '
        'certificate was replaced, or something in between (a proxy, a load balancer, an attacker) '
        'answers in its place. Find out which; if the new one is right: tentacle.py trust %s'
        % (stream.peer, endpoint.thumbprint, stream.thumbprint, stream.peer.partition(' ')[0]),
        stream.thumbprint,
    )


# ---- 7. BSON -------------------------------------------------------------------------------------
# As Json.NET writes it (wire notes 3; bsonspec.org 1.1): pure bytes <-> values.
#
#     document  int32 size of all of it, elements, 0x00
#     element   type byte, name, 0x00, value
#
#     types     1 double  2 string  3 document  4 array  5 binary  8 boolean  9 UTC date
#               10 null  16 int32  18 int64


class Int64(int):
    """An int that is written with 64 bits; a plain int is written with 32."""

    __slots__ = ()


class UtcDate(int):
    """Milliseconds since 1970 in UTC."""

    __slots__ = ()


class EncodedArray:
    """An array that stays BSON, however long it is: its elements are the bytes that `pieces()`
    gives, `size` of them.
    """

    def __init__(self, size: int, pieces: Callable[[], Iterable[bytes]]):
        self.size = size
        self.pieces = pieces


_INT32 = struct.Struct('<i')
_INT64 = struct.Struct('<q')
_DOUBLE = struct.Struct('<d')
_BINARY_HEAD = struct.Struct('<iB')
_UUID_SUBTYPES = (3, 4)
_LONGEST_NAME = 1 << 16  # bytes: the contracts' are short, those of variables are a person's


def _encode_scalar(value: Any) -> Tuple[bytes, bytes]:
    """(type, content) of a value that is neither a document nor an array."""
    if value is None:
        return b'\x0a', b''
    if isinstance(value, str):
        text = value.encode('utf-8', 'replace')
        return b'\x02', _INT32.pack(len(text) + 1) + text + b'\0'
    if isinstance(value, bool):
        return b'\x08', b'\1' if value else b'\0'
    if isinstance(value, UtcDate):
        return b'\x09', _INT64.pack(value)
    if isinstance(value, Int64):
        return b'\x12', _INT64.pack(value)
    if isinstance(value, int):
        return b'\x10', _INT32.pack(value)
    if isinstance(value, uuid.UUID):
        return b'\x05', _BINARY_HEAD.pack(16, 4) + value.bytes_le
    if isinstance(value, bytes):
        return b'\x05', _BINARY_HEAD.pack(len(value), 0) + value
    if isinstance(value, float):
        return b'\x01', _DOUBLE.pack(value)
    raise TypeError('BSON has no place for a %s' % type(value).__name__)


def _encode(document: Dict[str, Any], parts: List[Any]) -> int:
    """Append the bytes and the EncodedArrays of a document; its size."""
    head, size = len(parts), 5
    parts.append(b'')
    for key, value in document.items():
        name, kind = key.encode() + b'\0', b'\x03'
        if isinstance(value, list):
            value, kind = {str(i): item for i, item in enumerate(value)}, b'\x04'
        if isinstance(value, dict):
            parts.append(kind + name)
            size += 1 + len(name) + _encode(value, parts)
        elif isinstance(value, EncodedArray):
            parts += [b'\x04' + name + _INT32.pack(value.size + 5), value, b'\0']
            size += 1 + len(name) + 5 + value.size
        else:
            kind, content = _encode_scalar(value)
            parts.append(kind + name + content)
            size += 1 + len(name) + len(content)
    parts[head] = _INT32.pack(size)
    parts.append(b'\0')
    return size


def bson_pieces(document: Dict[str, Any]) -> Iterator[bytes]:
    """A document as bytes. Values: None, bool, int (32 bits), Int64, float, str, bytes, UUID,
    UtcDate, dict, list, EncodedArray.
    """
    parts: List[Any] = []
    _encode(document, parts)
    for part in parts:
        if isinstance(part, EncodedArray):
            yield from part.pieces()
        else:
            yield part


def encode_bson(document: Dict[str, Any]) -> bytes:
    """What `bson_pieces` gives, in one."""
    return b''.join(bson_pieces(document))


class ByteSource:
    """Bytes that are taken in order; `more` gives the next of them, b'' at their end. Raises
    ProtocolError where they end too soon.
    """

    def __init__(self, data: bytes = b'', more: Callable[[], bytes] = lambda: b''):
        self._data = data
        self._at = 0
        self._more = more

    def _have(self, count: int) -> None:
        parts = [self._data[self._at :]]
        size = len(parts[0])
        while size < count:
            part = self._more()
            if not part:
                raise ProtocolError('BSON: it ends in the middle')
            parts.append(part)
            size += len(part)
        self._data, self._at = b''.join(parts), 0

    def take(self, count: int) -> bytes:
        if self._at + count > len(self._data):
            self._have(count)
        self._at += count
        return self._data[self._at - count : self._at]

    def some(self, most: int) -> bytes:
        """At least a byte, where there is one; what is there already, but no more than `most`."""
        if self._at == len(self._data):
            self._have(1)
        return self.take(min(most, len(self._data) - self._at))

    def name(self) -> bytes:
        """What stands ahead of the next NUL, which is taken with it."""
        while True:
            end = self._data.find(b'\0', self._at)
            if end >= 0:
                return self.take(end + 1 - self._at)[:-1]
            if len(self._data) - self._at > _LONGEST_NAME:
                raise ProtocolError('BSON: a name is longer than %d bytes' % _LONGEST_NAME)
            self._have(len(self._data) - self._at + 1)

    def is_at_end(self) -> bool:
        return self._at == len(self._data) and not self._more()


#: type -> (size, what makes the value of that many bytes)
_FIXED_SIZES: Dict[int, Tuple[int, Callable[[bytes], Any]]] = {
    1: (8, lambda data: _DOUBLE.unpack(data)[0]),
    8: (1, lambda data: data != b'\0'),
    9: (8, lambda data: UtcDate(_INT64.unpack(data)[0])),
    10: (0, lambda data: None),
    16: (4, lambda data: _INT32.unpack(data)[0]),
    18: (8, lambda data: _INT64.unpack(data)[0]),
}


def _pieces_of(file: Any) -> Iterator[bytes]:
    file.seek(0)
    return iter(lambda: file.read(1 << 18), b'')


class BsonReader:
    """Reads documents from a source, within a budget of elements and of nesting; arrays under the
    names in `encoded` stay EncodedArray, of which nothing but the size is checked.
    """

    _IN_MEMORY = 1 << 16  # bytes of an encoded array; a longer one lies in a temporary file

    def __init__(self, source: ByteSource, elements: int, nesting: int, encoded: Container[str]):
        self._source = source
        self._elements = elements
        self._nesting = nesting
        self._encoded = encoded

    def document(self, limit: int, depth: int = 1, array: bool = False) -> Tuple[Any, int]:
        """(dict or list, size) of the next document, of at most `limit` bytes."""
        if depth > self._nesting:
            raise ProtocolError('BSON: more than %d documents within each other' % self._nesting)
        source, size = self._source, self._size(limit, 5)
        left = size - 5
        keys: List[str] = []
        values: List[Any] = []
        while left > 0:
            kind, name = source.take(1)[0], source.name()
            left -= 2 + len(name)
            if not array:
                keys.append(name.decode())
            if kind == 4 and not array and keys[-1] in self._encoded:
                value, taken = self._encoded_array(left)
            elif kind == 3 or kind == 4:
                value, taken = self.document(left, depth + 1, kind == 4)
            else:
                value, taken = self._scalar(kind, left)
            left -= taken
            values.append(value)
        if left or source.take(1) != b'\0':
            raise ProtocolError('BSON: a document does not end where it says')
        self._elements -= len(values)
        if self._elements < 0:
            raise ProtocolError('BSON: more elements than a message may have')
        return (values if array else dict(zip(keys, values))), size

    def _size(self, limit: int, least: int) -> int:
        """A size that is said, which counts itself among documents and arrays alone."""
        (size,) = _INT32.unpack(self._source.take(4))
        if not least <= size <= limit:
            raise ProtocolError(
                'BSON: something says that it has %d bytes; %d to %d were expected'
                % (size, least, limit)
            )
        return size

    def _scalar(self, kind: int, left: int) -> Tuple[Any, int]:
        take = self._source.take
        if kind == 2:
            size = self._size(left - 4, 1)
            text = take(size)
            if text[-1]:
                raise ProtocolError('BSON: a string does not end where it says')
            return text[:-1].decode(), size + 4
        if kind == 5:
            size = self._size(left - 5, 0)
            subtype, content = take(1)[0], take(size)
            if subtype in _UUID_SUBTYPES and size == 16:
                return uuid.UUID(bytes_le=content), 21
            return content, size + 5
        if kind not in _FIXED_SIZES:
            raise ProtocolError('BSON: the type %d is none that Halibut uses' % kind)
        size, make = _FIXED_SIZES[kind]
        return make(take(size)), size

    def _encoded_array(self, left: int) -> Tuple[EncodedArray, int]:
        size = self._size(left, 5) - 5
        if size <= self._IN_MEMORY:
            content = self._source.take(size)
            array = EncodedArray(size, lambda: [content])
        else:
            import tempfile

            file = tempfile.TemporaryFile(buffering=0)
            kept = 0
            while kept < size:
                kept += file.write(self._source.some(size - kept))
            array = EncodedArray(size, lambda: _pieces_of(file))
        if self._source.take(1) != b'\0':
            raise ProtocolError('BSON: an array does not end where it says')
        return array, size + 5


def read_bson(
    source: ByteSource, limit: int, elements: int, nesting: int, encoded: Container[str]
) -> Dict[str, Any]:
    """The one document that a source gives, up to the source's end."""
    try:
        document, _ = BsonReader(source, elements, nesting, encoded).document(limit)
    except (struct.error, UnicodeDecodeError) as error:
        raise ProtocolError('BSON: %s' % error)
    if not source.is_at_end():
        raise ProtocolError('BSON: there are bytes after the end of the document')
    return document


def decode_bson(
    data: bytes,
    elements: int = LIMITS.response_elements,
    nesting: int = LIMITS.nesting,
    encoded: Container[str] = (),
) -> Dict[str, Any]:
    """The one document that the bytes are: dict, list, str, int, float, bool, None, UtcDate, UUID,
    bytes, EncodedArray. Raises ProtocolError for anything else, and over the budget.
    """
    return read_bson(ByteSource(data), len(data), elements, nesting, encoded)


def documents_in(pieces: Iterable[bytes], keyed: bool = False) -> Iterator[List[bytes]]:
    """The documents that stand one after the other in pieces of bytes, a list for each piece;
    `keyed`: as the elements of an array do, each behind its type and key. A document that is not
    whole at the end is left out. Raises ProtocolError.
    """
    rest = b''
    for piece in pieces:
        data, at = rest + piece, 0
        found: List[bytes] = []
        while True:
            start = data.find(b'\0', at, at + 20) + 1 if keyed else at
            if (keyed and not start) or start + 4 > len(data):
                if keyed and not start and len(data) >= at + 20:
                    raise ProtocolError('BSON: an element of an array has no key')
                break
            (size,) = _INT32.unpack_from(data, start)
            if not 5 <= size <= LIMITS.response_bytes or (keyed and data[at] != 3):
                raise ProtocolError('BSON: a document was expected')
            if start + size > len(data):
                break
            found.append(data[start : start + size])
            at = start + size
        rest = data[at:]
        yield found


# ---- 8. Messages ---------------------------------------------------------------------------------
# Requests, responses, errors, data streams, and the contracts of the tentacle's services (wire
# notes 3 and 4). A contract is a class with a table of its members; `kinds` say how a member looks
# on the wire.


class DataStream:
    """A file on its way: `length` bytes that `open()` gives, sent after the message."""

    wire_type = 'Halibut.DataStream, Halibut'

    def __init__(
        self,
        length: int,
        open_source: Optional[Callable[[], BinaryIO]] = None,
        stream_id: Optional[uuid.UUID] = None,
    ):
        self.id = stream_id or uuid.uuid4()
        self.length = length
        self._open = open_source

    def open(self) -> BinaryIO:
        """A binary file at the first byte; the caller closes it."""
        if self._open is None:
            raise ProtocolError(
                'the bytes of a data stream were asked for before they were received'
            )
        return self._open()

    def received(self, open_source: Callable[[], BinaryIO]) -> None:
        """Say where the bytes are, now that they are here."""
        self._open = open_source


#: `$type` -> class, for all that may stand in a place typed as object. Filled by `contract`.
CONTRACTS: Dict[str, type] = {DataStream.wire_type: DataStream}

_LEGACY = 'Octopus.Shared.Contracts.%s, Octopus.Shared'
_CURRENT = 'Octopus.Tentacle.Contracts.%s, Octopus.Tentacle.Contracts'


def contract(wire_name: str) -> Callable[[type], type]:
    """Register a contract under its name on the wire; an older one is also read under its current
    name.
    """

    def register(cls: type) -> type:
        cls.wire_type = wire_name  # type: ignore[attr-defined]
        CONTRACTS[wire_name] = cls
        if wire_name == _LEGACY % cls.__name__:
            CONTRACTS[_CURRENT % cls.__name__] = cls
        return cls

    return register


def _plain_type(name: Any) -> str:
    """`Namespace.Type, Assembly` of a type name that may go on with a version and more."""
    if not isinstance(name, str):
        raise ProtocolError('a $type must be a string')
    return ', '.join(part.strip() for part in name.split(',')[:2])


class Kind:
    """How a member looks on the wire. `read` takes what BSON gave and raises ValueError for what
    does not fit.
    """

    default: Any = None

    def read(self, value: Any, streams: List[DataStream]) -> Any:
        raise NotImplementedError

    def write(self, value: Any, streams: List[DataStream]) -> Any:
        return value


class Text(Kind):
    def read(self, value: Any, streams: List[DataStream]) -> Optional[str]:
        if value is not None and not isinstance(value, str):
            raise ValueError('a string')
        return value


class SecretText(Text):
    """Text that no log or error may show."""

    def read(self, value: Any, streams: List[DataStream]) -> Optional[str]:
        text = super().read(value, streams)
        return None if text is None else Secret(text)


class Whole(Kind):
    """int32, int64, or a double with an integral value."""

    default = 0

    def __init__(self, wide: bool = False):
        self._wide = wide

    def read(self, value: Any, streams: List[DataStream]) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not -1 << 63 <= value < 1 << 63:
            raise ValueError('a whole number')
        return int(value)

    def write(self, value: int, streams: List[DataStream]) -> int:
        return Int64(value) if self._wide else value


class Choice(Kind):
    """An enum: its number, or its name."""

    default = 0

    def __init__(self, *names: str):
        self._names = [name.lower() for name in names]

    def read(self, value: Any, streams: List[DataStream]) -> int:
        if isinstance(value, str) and value.lower() in self._names:
            return self._names.index(value.lower())
        number = Whole().read(value, streams)
        if not 0 <= number < len(self._names):
            raise ValueError('one of ' + ', '.join(self._names))
        return number


class Span(Kind):
    """A .NET TimeSpan, `[-][d.]hh:mm:ss[.fffffff]`, as seconds."""

    _pattern = re.compile(r'(-?)(?:(\d{1,8})\.)?(\d{1,2}):(\d{1,2}):(\d{1,2})(?:\.(\d{1,7}))?\Z')

    def read(self, value: Any, streams: List[DataStream]) -> Optional[float]:
        if value is None:
            return None
        match = self._pattern.match(value) if isinstance(value, str) else None
        if not match:
            raise ValueError('a time span like 00:01:00')
        sign, days, hours, minutes, seconds, fraction = match.groups()
        span = int(days or 0) * 86400 + int(hours) * 3600 + int(minutes) * 60 + int(seconds)
        return (span + int((fraction or '0').ljust(7, '0')) / 1e7) * (-1 if sign else 1)

    def write(self, value: Optional[float], streams: List[DataStream]) -> Optional[str]:
        if value is None:
            return None
        ticks = round(abs(value) * 1e7)
        seconds, ticks = divmod(ticks, 10**7)
        days, seconds = divmod(seconds, 86400)
        text = '%02d:%02d:%02d' % (seconds // 3600, seconds // 60 % 60, seconds % 60)
        return '%s%s%s%s' % (
            '-' if value < 0 else '',
            '%d.' % days if days else '',
            text,
            '.%07d' % ticks if ticks else '',
        )


class Instant(Kind):
    """A DateTimeOffset, as milliseconds since 1970: a UTC date, or an ISO 8601 text with its
    offset.
    """

    default = 0
    _pattern = re.compile(
        r'(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?(?:Z|([+-])(\d\d):(\d\d))\Z'
    )

    def read(self, value: Any, streams: List[DataStream]) -> int:
        if isinstance(value, UtcDate):
            return int(value)
        match = self._pattern.match(value) if isinstance(value, str) else None
        if not match:
            raise ValueError('a date')
        import calendar

        fields = [int(match.group(i)) for i in range(1, 7)]
        offset = int(match.group(9) or 0) * 3600 + int(match.group(10) or 0) * 60
        seconds = calendar.timegm(tuple(fields) + (0, 0, 0)) - (
            -offset if match.group(8) == '-' else offset
        )
        return seconds * 1000 + int((match.group(7) or '0').ljust(3, '0')[:3])

    def write(self, value: int, streams: List[DataStream]) -> UtcDate:
        return UtcDate(value)


class ListOf(Kind):
    def __init__(self, item: Kind):
        self._item = item

    @property
    def default(self) -> List[Any]:  # type: ignore[override]
        return []

    def read(self, value: Any, streams: List[DataStream]) -> List[Any]:
        if value is None:
            return []
        if not isinstance(value, list) or None in value:
            raise ValueError('an array without nulls')
        return [self._item.read(item, streams) for item in value]

    def write(self, value: List[Any], streams: List[DataStream]) -> List[Any]:
        return [self._item.write(item, streams) for item in value]


class TextMap(Kind):
    """Names and texts: `Scripts`."""

    @property
    def default(self) -> Dict[str, str]:  # type: ignore[override]
        return {}

    def read(self, value: Any, streams: List[DataStream]) -> Dict[str, str]:
        if value is None:
            return {}
        if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
            raise ValueError('a document of strings')
        return {key: text for key, text in value.items() if key != '$type'}


class Stream(Kind):
    """A data stream in a member typed as one: id and length, without a $type."""

    def read(self, value: Any, streams: List[DataStream]) -> Optional[DataStream]:
        if value is None:
            return None
        members = (
            {key.lower(): item for key, item in value.items()} if isinstance(value, dict) else {}
        )
        stream_id, length = members.get('id'), members.get('length')
        if (
            not isinstance(stream_id, uuid.UUID)
            or isinstance(length, bool)
            or not isinstance(length, int)
            or length < 0
        ):
            raise ValueError('a data stream with id and length')
        stream = DataStream(length, stream_id=stream_id)
        streams.append(stream)
        return stream

    def write(
        self, value: Optional[DataStream], streams: List[DataStream]
    ) -> Optional[Dict[str, Any]]:
        if value is None:
            return None
        streams.append(value)
        return {'id': value.id, 'length': Int64(value.length)}


class Contract:
    """A class of the services' contracts: `members` maps our name to (name on the wire, kind)."""

    wire_type = ''
    members: Dict[str, Tuple[str, Kind]] = {}

    def __init__(self, **values: Any):
        for name, (_, kind) in self.members.items():
            setattr(self, name, values.pop(name) if name in values else kind.default)
        if values:
            raise TypeError('%s has no %s' % (type(self).__name__, ', '.join(values)))

    @classmethod
    def from_document(cls, document: Dict[str, Any], streams: List[DataStream]) -> 'Contract':
        """Read in the order of the document, since its data streams follow in that order."""
        by_wire_name = {wire.lower(): (name, kind) for name, (wire, kind) in cls.members.items()}
        values = {}
        for key, value in document.items():
            name, kind = by_wire_name.get(key.lower(), (None, None))
            if kind is not None:
                try:
                    values[name] = kind.read(value, streams)
                except ValueError as error:
                    raise ProtocolError('%s.%s must be %s' % (cls.__name__, printable(key), error))
        return cls(**values)

    def to_document(self, streams: List[DataStream]) -> Dict[str, Any]:
        return {
            wire: kind.write(getattr(self, name), streams)
            for name, (wire, kind) in self.members.items()
        }


class Nested(Kind):
    """A member of a contract that is itself one; a $type in it must name it."""

    def __init__(self, contract: type):
        self._contract = contract

    def read(self, value: Any, streams: List[DataStream]) -> Any:
        if value is None:
            return None
        if not isinstance(value, dict):
            raise ValueError('a document')
        if '$type' in value and CONTRACTS.get(_plain_type(value['$type'])) is not self._contract:
            raise ProtocolError('the type %s is outside the contracts' % printable(value['$type']))
        return self._contract.from_document(value, streams)  # type: ignore[attr-defined]

    def write(self, value: Any, streams: List[DataStream]) -> Any:
        return None if value is None else value.to_document(streams)


_SCRIPT_V2 = 'Octopus.Tentacle.Contracts.ScriptServiceV2.%s, Octopus.Tentacle.Contracts'
_CAPABILITIES = 'Octopus.Tentacle.Contracts.Capabilities.%s, Octopus.Tentacle.Contracts'

FULL_ISOLATION = 1
STDOUT, STDERR, DEBUG = 0, 1, 2
PENDING, RUNNING, COMPLETE = 0, 1, 2


@contract(_CAPABILITIES % 'CapabilitiesResponseV2')
class CapabilitiesResponseV2(Contract):
    members = {'supported_capabilities': ('SupportedCapabilities', ListOf(Text()))}


@contract(_LEGACY % 'ScriptTicket')
class ScriptTicket(Contract):
    members = {'task_id': ('TaskId', Text())}


@contract(_LEGACY % 'ScriptFile')
class ScriptFile(Contract):
    """A file that goes with a script, into its working directory: `contents` is a DataStream."""

    members = {
        'name': ('Name', Text()),
        'contents': ('Contents', Stream()),
        'encryption_password': ('EncryptionPassword', SecretText()),
    }


class LogEntry(NamedTuple):
    """One line of a script's log: the contract `ProcessOutput`."""

    source: int  # STDOUT, STDERR or DEBUG
    occurred: int  # milliseconds since 1970
    text: str


class ProcessOutput(Contract):
    members = {
        'source': ('Source', Choice('StdOut', 'StdErr', 'Debug')),
        'occurred': ('Occurred', Instant()),
        'text': ('Text', Text()),
    }


_ENTRY_HEAD = struct.Struct('<i8siB9sq6si')
#: An entry as every peer writes it.
_ENTRY = re.compile(
    rb'.{4}\x10Source\0([\0-\2])\0\0\0\x09Occurred\0(.{8})\x02Text\0(.{4})(.*)\0\0', re.S
)


def encode_entry(source: int, occurred: int, data: bytes) -> bytes:
    """A log entry, whose text is UTF-8, as the BSON document that it is on the wire and in a
    script's log.
    """
    head = _ENTRY_HEAD.pack(
        _ENTRY_HEAD.size + len(data) + 2,
        b'\x10Source\0',
        source,
        9,
        b'Occurred\0',
        occurred,
        b'\x02Text\0',
        len(data) + 1,
    )
    return head + data + b'\0\0'


def decode_entry(document: bytes) -> LogEntry:
    """Raises ProtocolError."""
    match = _ENTRY.match(document)
    if match:
        source, occurred, length, text = match.groups()
        if match.end() == len(document) and _INT32.unpack(length)[0] == len(text) + 1:
            return LogEntry(source[0], _INT64.unpack(occurred)[0], text.decode('utf-8', 'replace'))
    output = ProcessOutput.from_document(decode_bson(document), [])
    return LogEntry(output.source, output.occurred, output.text or '')


def array_of_entries(documents: Iterable[bytes], first: int = 0) -> bytes:
    """Log entries as elements of an array, the first of which has that index."""
    return b''.join([b'\x03%d\0%b' % pair for pair in enumerate(documents, first)])


class LogEntries:
    """The lines of a status answer, decoded one by one: an iterable of LogEntry. Iterating raises
    ProtocolError.
    """

    def __init__(self, array: EncodedArray):
        self.array = array

    def __iter__(self) -> Iterator[LogEntry]:
        for documents in documents_in(self.array.pieces(), keyed=True):
            yield from map(decode_entry, documents)


class Log(Kind):
    """The lines of a script: LogEntries as they come, and any list of LogEntry as they are sent."""

    @property
    def default(self) -> List[Any]:  # type: ignore[override]
        return []

    def read(self, value: Any, streams: List[DataStream]) -> LogEntries:
        if not isinstance(value, EncodedArray):
            raise ValueError('an array')
        return LogEntries(value)

    def write(self, value: Any, streams: List[DataStream]) -> EncodedArray:
        if isinstance(value, LogEntries):
            return value.array
        content = array_of_entries(
            encode_entry(source, occurred, text.encode('utf-8', 'replace'))
            for source, occurred, text in value
        )
        return EncodedArray(len(content), lambda: [content])


_TICKET = Nested(ScriptTicket)
_ISOLATION = Choice('NoIsolation', 'FullIsolation')
_STATE = Choice('Pending', 'Running', 'Complete')


@contract(_SCRIPT_V2 % 'StartScriptCommandV2')
class StartScriptCommandV2(Contract):
    members = {
        'ticket': ('ScriptTicket', _TICKET),
        'script_body': ('ScriptBody', Text()),
        'task_id': ('TaskId', Text()),
        'duration_to_wait': ('DurationToWaitForScriptToFinish', Span()),
        'isolation': ('Isolation', _ISOLATION),
        'mutex_timeout': ('ScriptIsolationMutexTimeout', Span()),
        'mutex_name': ('IsolationMutexName', Text()),
        'scripts': ('Scripts', TextMap()),
        'files': ('Files', ListOf(Nested(ScriptFile))),
        'arguments': ('Arguments', ListOf(Text())),
    }


@contract(_LEGACY % 'StartScriptCommand')
class StartScriptCommand(Contract):
    members = {
        'script_body': ('ScriptBody', Text()),
        'isolation': ('Isolation', _ISOLATION),
        'scripts': ('Scripts', TextMap()),
        'files': ('Files', ListOf(Nested(ScriptFile))),
        'arguments': ('Arguments', ListOf(Text())),
        'task_id': ('TaskId', Text()),
        'mutex_timeout': ('ScriptIsolationMutexTimeout', Span()),
        'mutex_name': ('IsolationMutexName', Text()),
    }


class _AboutTicket(Contract):
    members = {'ticket': ('Ticket', _TICKET)}


class _AboutTicketAndLog(Contract):
    members = {
        'ticket': ('Ticket', _TICKET),
        'last_log_sequence': ('LastLogSequence', Whole(wide=True)),
    }


@contract(_SCRIPT_V2 % 'ScriptStatusRequestV2')
class ScriptStatusRequestV2(_AboutTicketAndLog):
    pass


@contract(_SCRIPT_V2 % 'CancelScriptCommandV2')
class CancelScriptCommandV2(_AboutTicketAndLog):
    pass


@contract(_SCRIPT_V2 % 'CompleteScriptCommandV2')
class CompleteScriptCommandV2(_AboutTicket):
    pass


@contract(_LEGACY % 'ScriptStatusRequest')
class ScriptStatusRequest(_AboutTicketAndLog):
    pass


@contract(_LEGACY % 'CancelScriptCommand')
class CancelScriptCommand(_AboutTicketAndLog):
    pass


@contract(_LEGACY % 'CompleteScriptCommand')
class CompleteScriptCommand(_AboutTicketAndLog):
    pass


class _ScriptStatus(Contract):
    members = {
        'ticket': ('Ticket', _TICKET),
        'logs': ('Logs', Log()),
        'next_log_sequence': ('NextLogSequence', Whole(wide=True)),
        'state': ('State', _STATE),
        'exit_code': ('ExitCode', Whole()),
    }


@contract(_SCRIPT_V2 % 'ScriptStatusResponseV2')
class ScriptStatusResponseV2(_ScriptStatus):
    pass


@contract(_LEGACY % 'ScriptStatusResponse')
class ScriptStatusResponse(_ScriptStatus):
    pass


@contract(_LEGACY % 'UploadResult')
class UploadResult(Contract):
    members = {
        'full_path': ('FullPath', Text()),
        'hash': ('Hash', Text()),
        'length': ('Length', Whole(wide=True)),
    }


def read_object(value: Any, streams: List[DataStream]) -> Any:
    """A value from a place typed as object: a document is what its `$type`, its first key, says.

    One without stays a dict, as Json.NET has it, and fits no parameter. Raises ProtocolError.
    """
    if not isinstance(value, dict) or next(iter(value), None) != '$type':
        return value
    cls = CONTRACTS.get(_plain_type(value['$type']))
    if cls is None:
        raise ProtocolError('the type %s is outside the contracts' % printable(value['$type']))
    if cls is DataStream:
        try:
            return Stream().read(value, streams)
        except ValueError as error:
            raise ProtocolError('a parameter must be %s' % error)
    return cls.from_document(value, streams)  # type: ignore[attr-defined]


def write_object(value: Any, streams: List[DataStream]) -> Any:
    """The same the other way round."""
    if isinstance(value, DataStream):
        return dict({'$type': DataStream.wire_type}, **Stream().write(value, streams) or {})
    if isinstance(value, Contract):
        return dict({'$type': value.wire_type}, **value.to_document(streams))
    return value


_REQUEST_TYPE = 'Halibut.Transport.Protocol.RequestMessage, Halibut'
_RESPONSE_TYPE = 'Halibut.Transport.Protocol.ResponseMessage, Halibut'

SERVICE_NOT_FOUND = 'Halibut.Exceptions.ServiceNotFoundHalibutClientException'
METHOD_NOT_FOUND = 'Halibut.Exceptions.MethodNotFoundHalibutClientException'
AMBIGUOUS_METHOD = 'Halibut.Exceptions.AmbiguousMethodMatchHalibutClientException'


class Request(NamedTuple):
    id: str
    service: str
    method: str
    params: List[Any]
    activity_id: Optional[uuid.UUID] = None
    endpoint: Optional[ServiceEndPoint] = None


class Response(NamedTuple):
    id: str
    result: Any = None
    error: Optional[ServiceError] = None


def _members_of(message: Any, type_name: str, what: str) -> Dict[str, Any]:
    """A message's members by lower-case name; its `$type`, where there is one, must be the
    expected.
    """
    if not isinstance(message, dict):
        raise ProtocolError('a %s was expected, %s came' % (what, type(message).__name__))
    if '$type' in message and _plain_type(message['$type']) != type_name:
        raise ProtocolError('a %s was expected, %s came' % (what, printable(message['$type'])))
    return {key.lower(): value for key, value in message.items()}


def _text_member(members: Dict[str, Any], name: str, what: str) -> str:
    value = members.get(name)
    if not isinstance(value, str):
        raise ProtocolError('the %s of a %s must be a string' % (name, what))
    return value


def _endpoint_of(document: Any) -> Optional[ServiceEndPoint]:
    """The endpoint of a request, where it has one."""
    if not isinstance(document, dict):
        return None
    members = {key.lower(): value for key, value in document.items() if isinstance(value, str)}
    try:
        queue_timeout = Span().read(members.get('pollingrequestqueuetimeout'), [])
    except ValueError:
        queue_timeout = None
    return ServiceEndPoint(
        members.get('baseuri', ''),
        members.get('remotethumbprint'),
        queue_timeout=LIMITS.queue if queue_timeout is None else queue_timeout,
    )


def request_from_message(message: Any) -> Tuple[Request, List[DataStream]]:
    """(request, its data streams in the order they follow) of a decoded `Message`. Raises
    ProtocolError.
    """
    members = _members_of(message, _REQUEST_TYPE, 'request')
    streams: List[DataStream] = []
    params = members.get('params')
    if not isinstance(params, (list, type(None))):
        raise ProtocolError('the params of a request must be an array')
    activity = members.get('activityid')
    return Request(
        _text_member(members, 'id', 'request'),
        _text_member(members, 'service', 'request'),
        _text_member(members, 'method', 'request'),
        [read_object(value, streams) for value in params or []],
        activity if isinstance(activity, uuid.UUID) else None,
        _endpoint_of(members.get('endpoint')),
    ), streams


def request_to_message(request: Request) -> Tuple[Dict[str, Any], List[DataStream]]:
    """All the keys of the original, in its order (wire notes 3); never a proxy's password."""
    endpoint = request.endpoint or ServiceEndPoint('')
    streams: List[DataStream] = []
    return {
        '$type': _REQUEST_TYPE,
        'id': request.id,
        'activityId': request.activity_id,
        'endpoint': {
            'PollingRequestQueueTimeout': Span().write(endpoint.queue_timeout, streams),
            'RetryListeningSleepInterval': '00:00:01',
            'RetryCountLimit': 5,
            'ConnectionErrorRetryTimeout': '00:05:00',
            'TcpClientConnectTimeout': '00:01:00',
            'BaseUri': endpoint.uri,
            'RemoteThumbprint': endpoint.thumbprint,
            'Proxy': None,
            'ForceResolveHost': None,
            'IsWebSocketEndpoint': False,
        },
        'service': request.service,
        'method': request.method,
        'params': [write_object(value, streams) for value in request.params],
    }, streams


def response_from_message(message: Any) -> Tuple[Response, List[DataStream]]:
    """(response, its data streams) of a decoded `Message`. Raises ProtocolError."""
    members = _members_of(message, _RESPONSE_TYPE, 'response')
    streams: List[DataStream] = []
    error = members.get('error')
    if isinstance(error, dict):
        said = {key.lower(): value for key, value in error.items() if isinstance(value, str)}
        error = ServiceError(
            said.get('message', ''), said.get('halibuterrortype'), said.get('details')
        )
    elif error is not None:
        raise ProtocolError('the error of a response must be a document')
    return Response(
        _text_member(members, 'id', 'response'), read_object(members.get('result'), streams), error
    ), streams


def response_to_message(response: Response) -> Tuple[Dict[str, Any], List[DataStream]]:
    streams: List[DataStream] = []
    error = response.error
    return {
        '$type': _RESPONSE_TYPE,
        'id': response.id,
        'error': error
        and {'message': str(error), 'details': error.details, 'HalibutErrorType': error.error_type},
        'result': write_object(response.result, streams),
    }, streams


# ---- 9. Message serializer -----------------------------------------------------------------------
# A message is a raw DEFLATE stream of the BSON document {"Message": M}; nothing says how long it is
# but its own final block (wire notes 3). Any object with `read_some` and `unread` serves as the
# stream.

_INFLATE_STEP = 1 << 18
_PACKED_STEP = 1 << 16  # bytes: a longer message is sent in pieces of at least so many


def packed_message(message: Optional[Dict[str, Any]]) -> Iterator[bytes]:
    """The bytes of a message, in pieces; None is the keep-alive of a polling connection."""
    deflate = zlib.compressobj(level=1, wbits=-15)
    packed = bytearray()
    for piece in bson_pieces({'Message': message}):
        packed += deflate.compress(piece)
        if len(packed) >= _PACKED_STEP:
            yield bytes(packed)
            packed.clear()
    yield bytes(packed) + deflate.flush()


def pack_message(message: Optional[Dict[str, Any]]) -> bytes:
    """What `packed_message` gives, in one."""
    return b''.join(packed_message(message))


#: What a server sends to a polling tentacle for which it has no work.
NULL_MESSAGE = pack_message(None)


class _Inflater:
    """Inflates what a stream gives, a piece at a time."""

    def __init__(self, stream: Any, limit: int):
        self._stream = stream
        # Empty blocks inflate to nothing for ever: what comes in is bounded as well.
        self._limit = limit + (1 << 16)
        self._inflate = zlib.decompressobj(-15)
        self._taken = 0
        self._has_more = False  # inflated bytes that wait inside zlib

    def __call__(self) -> bytes:
        """The next bytes; b'' at the end of the DEFLATE stream. Raises ProtocolError,
        ConnectionLost, and EOFError when the stream has ended already.
        """
        part = b''
        while not (part or self._inflate.eof):
            packed = self._inflate.unconsumed_tail
            if not (packed or self._has_more):
                packed = self._receive()
            try:
                part = self._inflate.decompress(packed, _INFLATE_STEP)
            except zlib.error as error:
                raise ProtocolError('a message is not DEFLATE: %s' % error)
            self._has_more = len(part) == _INFLATE_STEP
        return part

    def _receive(self) -> bytes:
        packed = self._stream.read_some()
        if not packed and not self._taken:
            raise EOFError
        if not packed:
            raise ConnectionLost('the connection ended in the middle of a message')
        self._taken += len(packed)
        if self._taken > self._limit:
            raise ProtocolError('a message has more than %d bytes' % self._limit)
        return packed

    def give_back(self) -> None:
        """Leave in the stream what follows the message."""
        self._stream.unread(self._inflate.unused_data)


def read_document(
    stream: Any, max_bytes: int, max_elements: int, nesting: int = LIMITS.nesting
) -> Optional[Dict[str, Any]]:
    """Read one message's document, whose `Logs` stay encoded; what follows it stays in the stream.
    None: the stream ended before it.

    Raises ProtocolError (not DEFLATE, not BSON, over a budget), ConnectionLost (ended within).
    """
    inflater = _Inflater(stream, max_bytes)
    try:
        source = ByteSource(more=inflater)
        document = read_bson(source, max_bytes, max_elements, nesting, ('Logs',))
    except EOFError:
        return None
    inflater.give_back()
    return document


def message_of(document: Dict[str, Any]) -> Any:
    """The `Message` of a document. Raises ProtocolError where there is none."""
    for key, value in document.items():
        if key.lower() == 'message':
            return value
    raise ProtocolError('a document without Message came')


# ---- 10. Identification and control messages -----------------------------------------------------

GREETING = b'MX\n\n'
CLIENT, SUBSCRIBER, SERVER = 'MX-CLIENT', 'MX-SUBSCRIBER', 'MX-SERVER'
NEXT, PROCEED, END = 'NEXT', 'PROCEED', 'END'
REQUEST, RESPONSE, KEEP_ALIVE = 'request', 'response', 'null request'

#: What may come next, whoever sends it: state -> {event: state after it} (wire notes 1 and 2). Both
#: ends of a connection walk through the same states, so one table serves every role.
LEGAL_EVENTS = {
    'connected': {CLIENT: 'client named', SUBSCRIBER: 'subscriber named'},
    'client named': {SERVER: 'client may call'},
    'client may call': {REQUEST: 'called by client'},
    'called by client': {RESPONSE: 'client answered'},
    'client answered': {NEXT: 'client goes on', END: 'ended'},
    'client goes on': {PROCEED: 'client may call'},
    'subscriber named': {SERVER: 'server may call'},
    'server may call': {REQUEST: 'called by server', KEEP_ALIVE: 'subscriber answered'},
    'called by server': {RESPONSE: 'subscriber answered'},
    'subscriber answered': {NEXT: 'subscriber goes on', END: 'ended'},
    'subscriber goes on': {PROCEED: 'server may call'},
    'ended': {},
}


class Conversation:
    """Where a connection's conversation stands; `advance` is called for each line and message, read
    or written.
    """

    def __init__(self) -> None:
        self.state = 'connected'

    def advance(self, event: str) -> None:
        """Raises ProtocolError that names what was expected and what came."""
        legal = LEGAL_EVENTS[self.state]
        if event not in legal:
            raise ProtocolError(
                '%s was expected, %s came' % (' or '.join(legal) or 'nothing', printable(event, 60))
            )
        self.state = legal[event]


def identification_line(word: str, subscription: str = '') -> bytes:
    """The line and the empty line after it, to be sent in one write (old peers fail otherwise)."""
    return ('%s 1.0%s\r\n\r\n' % (word, ' ' + subscription if subscription else '')).encode()


def parse_identification(line: str) -> Tuple[str, str]:
    """(word, subscription or '') of an identification line; the version number is not checked."""
    parts = line.split(' ')
    if len(parts) < 2 or parts[0] not in (CLIENT, SUBSCRIBER, SERVER):
        raise ProtocolError(
            'an identification like MX-CLIENT 1.0 was expected, %s came' % printable(line, 60)
        )
    return parts[0], ' '.join(parts[2:])


def end_of_greeting(held: bytes) -> int:
    """The length of a greeting up to and with its blank line (LF LF, CRs ignored), 0 when it is not
    whole.
    """
    match = re.search(rb'\n\r*\n', held)
    return match.end() if match else 0


# ---- 11. Message exchange ------------------------------------------------------------------------

_COPY_STEP = 1 << 20


def require_room(folder: str, length: int, limits: Limits) -> None:
    """Raises TentacleError when a folder's disk has no room for a data stream."""
    disk = os.statvfs(folder)
    room = max(disk.f_bavail * disk.f_frsize - limits.spare_disk, 0)
    if length > limits.stream_in_memory and length > room:
        raise TentacleError(
            'a data stream of %d bytes does not fit: %d bytes of its disk may be used'
            % (length, room)
        )


def sync_folder(descriptor: int) -> None:
    """Have a rename in a folder survive a power cut, where its file system can."""
    with contextlib.suppress(OSError):
        readable = os.open('.', os.O_RDONLY | os.O_CLOEXEC, dir_fd=descriptor)
        try:
            os.fsync(readable)
        finally:
            os.close(readable)


def keep_owner_and_mode(descriptor: int, details: os.stat_result) -> None:
    """Make a new file look like the one that it will replace. Raises TentacleError."""
    new = os.fstat(descriptor)
    if (new.st_uid, new.st_gid) != (details.st_uid, details.st_gid):
        try:
            os.fchown(descriptor, details.st_uid, details.st_gid)
        except PermissionError:
            raise TentacleError(
                'The file belongs to user %d, group %d, and we (user %d) can not replace it by one '
                'that does. Remove it first, or run as root'
                % (details.st_uid, details.st_gid, os.geteuid())
            )
    os.fchmod(descriptor, stat.S_IMODE(details.st_mode))


def write_soon(file: BinaryIO, part: memoryview) -> None:
    """Write a big part of a file and, on Linux, have the disk begin with it, so that the fsync at
    the end finds little to do.
    """
    file.write(part)
    if hasattr(os, 'posix_fadvise'):
        with contextlib.suppress(OSError):  # a pipe, or a terminal
            begin = file.tell() - len(part)
            os.posix_fadvise(file.fileno(), begin, len(part), os.POSIX_FADV_DONTNEED)


#: Of the files that are to replace others, until they do.
TEMPORARY_PREFIX = '.tentacle-upload-'


def file_details(folder: int, name: str, path: str) -> Optional[os.stat_result]:
    """Of the file `name` in an open folder, None when there is none. Raises TentacleError, with its
    `path`, for what is no file.
    """
    try:
        details = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(details.st_mode):
        raise TentacleError('%s is a device, a pipe or the like, not a file' % path)
    return details


@contextlib.contextmanager
def replacing(
    folder: int, name: str, temporary: str, details: Optional[os.stat_result]
) -> Iterator[BinaryIO]:
    """A new file to write in an open folder. At the end, when all went well, it is on the disk and
    replaces `name`, whose `details` it takes over; else it is gone.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, 0o600 if details else 0o666, dir_fd=folder)
    try:
        with open(descriptor, 'wb') as target:
            yield target
            target.flush()
            if details:
                keep_owner_and_mode(descriptor, details)
            os.fsync(descriptor)
        os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=folder)
        raise
    sync_folder(folder)


def pump(
    source: Any,
    use: Callable[[memoryview], Any],
    length: int = sys.maxsize,
    read_ahead: bool = False,
) -> int:
    """Hand the bytes of a binary file to `use` in big parts, `length` of them at most; how many
    there were.

    Of a long one a helper thread uses each part, or reads the next one ahead, while this thread has
    the wire: what reads, hashes and writes leaves the interpreter to others. The wire is never the
    helper's, which must not be waited for when this thread is interrupted.
    """
    here = memoryview(bytearray(min(length, _COPY_STEP)))
    count = total = source.readinto(here)
    if count < _COPY_STEP or count == length:  # a short one, or from a socket
        while count:
            use(here[:count])
            count = source.readinto(here[: length - total])
            total += count
        return total
    from concurrent.futures import ThreadPoolExecutor

    there = memoryview(bytearray(_COPY_STEP))
    with ThreadPoolExecutor(1, 'file') as helper:
        while count:
            if read_ahead:
                helped = helper.submit(source.readinto, there[: length - total])
                use(here[:count])
                count = helped.result()
            else:
                helped = helper.submit(use, here[:count])
                count = source.readinto(there[: length - total])
                helped.result()
            total += count
            here, there = there, here
    return total


class _WireReader(io.RawIOBase):
    """The bytes of the data stream that comes next on a connection; who has the last of them can
    be sure of its end.
    """

    def __init__(self, stream: SecureStream, length: int):
        self._stream = stream
        self._length = length
        self.left = length
        if not length:
            self._check_end()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: self.left]
        if not view:
            return 0
        self._stream.read_into(view)
        self.left -= len(view)
        if not self.left:
            self._check_end()
        return len(view)

    def _check_end(self) -> None:
        if self._stream.read_exactly(8) != _INT64.pack(self._length):
            raise ProtocolError('the length after a data stream is not the one before it')


class IncomingStreams:
    """The data streams of a message, on the wire until they are opened, each of them once.

    Whichever comes first is waited for; what must make way for another one lies in `spool`, a
    folder, without a name there.
    """

    def __init__(
        self,
        stream: SecureStream,
        streams: List[DataStream],
        spool: Optional[str],
        limits: Limits,
    ):
        if len(streams) > limits.data_streams:
            raise ProtocolError(
                'a message with %d data streams came, %d are taken'
                % (len(streams), limits.data_streams)
            )
        self._stream = stream
        self._spool = spool
        self._limits = limits
        self._awaited = {data_stream.id: data_stream.length for data_stream in streams}
        self._kept: Dict[uuid.UUID, BinaryIO] = {}
        self._reader: Any = None  # of the one that is being read
        if len(self._awaited) < len(streams):
            raise ProtocolError('two data streams of a message have the same id')
        for data_stream in streams:
            data_stream.received(lambda wanted=data_stream.id: self._open(wanted))

    def _next(self) -> uuid.UUID:
        """The id of the data stream that comes now; `_reader` has its bytes."""
        self._finish_reader()
        head = self._stream.read_exactly(24)
        (length,) = _INT64.unpack(head[16:])
        stream_id = uuid.UUID(bytes_le=head[:16])
        if self._awaited.pop(stream_id, None) != length:
            raise ProtocolError(
                'a data stream of %d bytes came that the message does not name so' % length
            )
        self._reader = _WireReader(self._stream, length)
        return stream_id

    def _finish_reader(self) -> None:
        """Read past what its reader has left."""
        if self._reader is not None and self._reader.left:
            pump(self._reader, lambda part: None, self._reader.left)

    def _open(self, wanted: uuid.UUID) -> BinaryIO:
        while wanted in self._awaited:
            came = self._next()
            if came == wanted:
                return self._reader
            self._keep(came)
        if wanted not in self._kept:
            raise ProtocolError('a data stream can be read once')
        return self._kept.pop(wanted)

    def _keep(self, stream_id: uuid.UUID) -> None:
        import tempfile

        length = self._reader.left
        file: Any = io.BytesIO()
        if length > self._limits.stream_in_memory:
            folder = self._spool or tempfile.gettempdir()
            require_room(folder, length, self._limits)
            file = tempfile.TemporaryFile(dir=folder)
        self._kept[stream_id] = file
        try:
            pump(self._reader, file.write, length)
        except BaseException:
            for kept in self._kept.values():  # nobody will have them
                kept.close()
            raise
        file.seek(0)

    def keep_all(self) -> None:
        """Take them all from the wire, which is then free for the next message."""
        while self._awaited:
            self._keep(self._next())

    def read_past(self) -> None:
        """Read what nobody took, so that the connection can go on. Raises ProtocolError when it is
        too much.
        """
        left = self._reader.left if self._reader is not None else 0
        left += sum(self._awaited.values())
        if left > self._limits.read_past:
            raise ProtocolError('%d bytes of data streams would come that nobody takes' % left)
        while self._awaited:
            self._next()
        self._finish_reader()


#: Runs a request, and hands its response to the function.
Handler = Callable[[Request, Callable[[Response], None]], None]


class MessageExchange:
    """Requests and responses, with their data streams, over a stream whose peer is known.

    Data streams that arrive lie in `spool`, a folder, without a name there. Used by one thread at a
    time.
    """

    def __init__(self, stream: SecureStream, spool: Optional[str] = None, limits: Limits = LIMITS):
        self.stream = stream
        self._spool = spool
        self._limits = limits
        self._conversation = Conversation()

    # -- lines

    def _read_control(self) -> Optional[str]:
        """The next line that is not empty; None at the end of the stream."""
        for _ in range(self._limits.control_line):
            line = self.stream.read_line(self._limits.control_line)
            if line != '':
                return line
        raise ProtocolError('%s sends nothing but empty lines' % self.stream.peer)

    def _write_control(self, word: str) -> None:
        self._conversation.advance(word)
        self.stream.write(word.encode() + b'\r\n')

    def _read_identification(self) -> Tuple[str, str]:
        line = self._read_control()
        if line is None:
            raise ConnectionLost(
                '%s closed the connection instead of identifying itself' % self.stream.peer
            )
        word, subscription = parse_identification(line)
        if self.stream.read_line(self._limits.control_line) != '':
            raise ProtocolError('an empty line was expected after %s' % word)
        self._conversation.advance(word)
        return word, subscription

    # -- messages

    def _write_message(
        self, message: Dict[str, Any], streams: List[DataStream], control: bytes = b''
    ) -> None:
        """A message and the control line after it, in one write where both are short."""
        self.stream.set_timeout(self._limits.progress)
        last = b''
        for piece in packed_message(message):
            if last:
                self.stream.write(last)
            last = piece
        if streams:
            self.stream.write(last)
            last = b''
        for data_stream in streams:
            self._write_stream(data_stream)
        if last or control:
            self.stream.write(last + control)

    def _write_stream(self, data_stream: DataStream) -> None:
        """id, length, the bytes, the length again (wire notes 3)."""
        length = _INT64.pack(data_stream.length)
        with data_stream.open() as source:
            self.stream.write(data_stream.id.bytes_le + length)
            sent = pump(source, self.stream.write, data_stream.length, read_ahead=True)
        if sent < data_stream.length:
            raise ConnectionLost(
                'a file became shorter while it was sent: the connection is given up'
            )
        self.stream.write(length)

    def _read_message(self, max_bytes: int, max_elements: int, wait: float) -> Any:
        """The decoded `Message`; EOFError when the stream ends ahead of it."""
        self.stream.set_timeout(wait)
        self.stream.unread(self.stream.read_some())
        self.stream.set_timeout(self._limits.progress)
        document = read_document(self.stream, max_bytes, max_elements, self._limits.nesting)
        if document is None:
            raise EOFError
        return message_of(document)

    def _incoming_streams(self, streams: List[DataStream]) -> IncomingStreams:
        return IncomingStreams(self.stream, streams, self._spool, self._limits)

    # -- roles

    def as_client(self) -> None:
        """Identify ourselves to a listening service; `call` may follow. Raises ConnectionLost,
        ProtocolError.
        """
        self.stream.set_timeout(self._limits.handshake)
        self.stream.write(GREETING)
        self._conversation.advance(CLIENT)
        self.stream.write(identification_line(CLIENT))
        self._read_identification()

    def call(self, request: Request, take: Optional[Callable[[Response], None]] = None) -> Response:
        """Send a request, with `go_on` ahead of it when it is not the first, and await its
        response.

        `take` gets the response while its data streams are still on the wire, and may read each of
        them once; without it they are kept for whoever reads them later. Raises ConnectionLost (the
        call may have run), ProtocolError; an error in the answer is in the response, not raised.
        """
        self._conversation.advance(REQUEST)
        self._write_message(*request_to_message(request))
        limits = self._limits
        try:
            message = self._read_message(
                limits.response_bytes, limits.response_elements, limits.response
            )
        except EOFError:
            raise ConnectionLost(
                '%s closed the connection instead of answering %s.%s'
                % (self.stream.peer, request.service, request.method)
            )
        response, streams = response_from_message(message)
        if response.id != request.id:
            raise ProtocolError(
                '%s answers another request than the one it was asked' % self.stream.peer
            )
        self._conversation.advance(RESPONSE)
        incoming = self._incoming_streams(streams)
        if take is None:
            incoming.keep_all()
        else:
            take(response)
            incoming.read_past()
        return response

    def go_on(self) -> None:
        """Ask for another call on this connection; until this returns nothing of that call has been
        sent.

        Raises ConnectionLost: a pooled connection that died meanwhile.
        """
        self._write_control(NEXT)
        self._await_proceed()

    def _await_proceed(self) -> None:
        self.stream.set_timeout(self._limits.progress)
        word = self._read_control()
        if word is None:
            raise ConnectionLost('%s has closed the connection' % self.stream.peer)
        self._conversation.advance(word)

    def leave(self) -> None:
        """Say END where it is our turn, and close; never raises."""
        try:
            if END in LEGAL_EVENTS[self._conversation.state]:
                self._write_control(END)
        except TentacleError:
            pass  # it is gone already
        self.close()

    def _accept(self, expected: str) -> str:
        """Let the peer identify itself, and do so too; its subscription."""
        word, subscription = self._read_identification()
        if word != expected:
            raise ProtocolError(
                '%s was expected, %s came: %s'
                % (
                    expected,
                    word,
                    'a listening tentacle is called, not polled'
                    if expected == CLIENT
                    else 'this port is for tentacles that poll',
                )
            )
        return subscription

    def _identify_as_server(self) -> None:
        self._conversation.advance(SERVER)
        self.stream.write(identification_line(SERVER))

    def as_server(self, handle: Handler) -> None:
        """Be the service of a client that dialled us, until it has no more calls.

        `handle` gets each request, whose data streams can be read once, straight from the wire, and
        a function that it calls once, with the response. It raises nothing but what these do.
        Raises ConnectionLost, ProtocolError.
        """
        self._accept(CLIENT)
        self._identify_as_server()
        limits = self._limits
        while True:
            try:
                message = self._read_message(
                    limits.request_bytes, limits.request_elements, limits.idle
                )
            except EOFError:
                return
            self._serve_one(message, handle)
            self.stream.set_timeout(limits.idle)
            self.stream.idle_since = time.monotonic()
            if not self.asks_for_more():
                return
            self.stream.idle_since = 0.0

    def as_subscriber(
        self,
        subscription: str,
        handle: Handler,
        on_identified: Callable[[], None] = lambda: None,
        patience: Callable[[], float] = lambda: LIMITS.request,
        goes_on: Callable[[bool], bool] = lambda idle: True,
    ) -> None:
        """Be the service of a server that we have dialled, until one of the two leaves.

        `patience` gives the seconds of the next wait for a request; `goes_on` is asked after each,
        with whether it was null. Raises ConnectionLost, ProtocolError.
        """
        self.stream.set_timeout(self._limits.handshake)
        self.stream.write(GREETING)
        self._conversation.advance(SUBSCRIBER)
        self.stream.write(identification_line(SUBSCRIBER, subscription))
        self._read_identification()
        on_identified()
        limits = self._limits
        while True:
            try:
                message = self._read_message(
                    limits.request_bytes, limits.request_elements, patience()
                )
            except EOFError:
                raise ConnectionLost('%s has closed the connection' % self.stream.peer)
            if message is not None:
                # Asking whether to go on comes ahead of the answer: the two go in one write.
                word = NEXT if goes_on(False) else END
                self._serve_one(message, handle, word)
            else:
                self._conversation.advance(KEEP_ALIVE)
                word = NEXT if goes_on(True) else END
                self._write_control(word)
            if word == END:
                return
            self._await_proceed()

    def accept_subscriber(self, subscribe: Callable[[str], None]) -> None:
        """Let a polling service that dialled us identify itself; we are its client from now on.

        `subscribe` gets its subscription, and raises TentacleError to refuse it. Raises
        ConnectionLost, ProtocolError.
        """
        subscribe(self._accept(SUBSCRIBER))
        self._identify_as_server()

    def send_null(self) -> None:
        """Such a client's request when it has no call; `asks_for_more` comes next."""
        self._conversation.advance(KEEP_ALIVE)
        self.stream.write(NULL_MESSAGE)

    def asks_for_more(self) -> bool:
        """Whether the other side, whose turn it is, goes on, which it is told that it may. Raises
        ConnectionLost, ProtocolError.
        """
        word = self._read_control() or END
        self._conversation.advance(word)
        if word == END:
            return False
        self._write_control(PROCEED)
        return True

    def _serve_one(self, message: Any, handle: Handler, control: str = '') -> None:
        request, streams = request_from_message(message)
        self._conversation.advance(REQUEST)
        incoming = self._incoming_streams(streams)

        def answer(response: Response) -> None:
            incoming.read_past()
            self._conversation.advance(RESPONSE)
            line = b''
            if control:
                self._conversation.advance(control)
                line = control.encode() + b'\r\n'
            self._write_message(*response_to_message(response), control=line)

        handle(request, answer)

    def close(self) -> None:
        self.stream.close()


# ---- 12. Service invocation ----------------------------------------------------------------------
# Service names are matched with case, method names without; parameters are positional (wire notes
# 4). What is not `@exposed` can not be called.


def exposed(
    wire_name: str, *parameters: type
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let peers call a method under a name, with parameters of these types (str, DataStream or
    contracts).
    """

    def mark(method: Callable[..., Any]) -> Callable[..., Any]:
        method.exposed_as = wire_name  # type: ignore[attr-defined]
        method.parameters = parameters  # type: ignore[attr-defined]
        return method

    return mark


def _exposed_methods(service: Any) -> Dict[str, Callable[..., Any]]:
    methods = (getattr(service, name) for name in dir(type(service)) if not name.startswith('_'))
    return {
        method.exposed_as.lower(): method for method in methods if hasattr(method, 'exposed_as')
    }


def _failed(message: str, error_type: Optional[str] = None, cause: str = '') -> ServiceError:
    return ServiceError(message, error_type, '%s: %s' % (error_type or cause, message))


def _failed_inside(error: Exception) -> ServiceError:
    """A failure inside a service, with the details by which clients classify it (wire notes 4)."""
    return ServiceError(
        str(error),
        None,
        'System.Reflection.TargetInvocationException: Exception has been thrown by the '
        'target of an invocation.\n ---> %s: %s' % (type(error).__name__, error),
    )


class ServiceRegistry:
    """The services of one agent, by name. Any thread may invoke."""

    def __init__(self, services: Dict[str, Any]):
        self._methods = {name: _exposed_methods(service) for name, service in services.items()}

    def invoke(self, request: Request) -> Response:
        """Run a request; whatever happens becomes a response, but for the end of the connection
        that its data streams come from: ConnectionLost, ProtocolError.
        """
        facts = {'service': printable(request.service), 'method': printable(request.method)}
        ticket = getattr(request.params[0], 'ticket', None) if request.params else None
        audit('call', ticket=ticket and printable(ticket.task_id), **facts)
        try:
            return Response(request.id, self._call(request))
        except (ConnectionLost, ProtocolError):
            raise
        except ServiceError as error:
            audit('call-failed', reason=printable(error), **facts)
            return Response(request.id, error=error)
        except (TentacleError, OSError, MemoryError) as error:
            audit('call-failed', reason=printable(error), **facts)
            logger.warning(
                '%s.%s failed: %s',
                printable(request.service),
                printable(request.method),
                printable(error),
            )
            return Response(request.id, error=_failed_inside(error))
        except Exception as error:  # a bug: ours to log, theirs to know of
            logger.exception(
                '%s.%s failed: a bug', printable(request.service), printable(request.method)
            )
            return Response(request.id, error=_failed_inside(error))

    def handle(self, request: Request, answer: Callable[[Response], None]) -> None:
        """The same as a `Handler`."""
        answer(self.invoke(request))

    def _call(self, request: Request) -> Any:
        methods = self._methods.get(request.service)
        if methods is None:
            raise _failed(
                'Error: %s has not been registered through an IAutofacServiceSource'
                % request.service,
                cause='Octopus.Tentacle.Communications.UnknownServiceNameException',
            )
        method = methods.get(request.method.lower())
        if method is None:
            raise _failed(
                'Method %s::%s not found' % (request.service, request.method), METHOD_NOT_FOUND
            )
        expected = method.parameters  # type: ignore[attr-defined]
        if len(expected) != len(request.params) or not all(
            value is None or isinstance(value, kind)
            for value, kind in zip(request.params, expected)
        ):
            raise _failed(
                '%s::%s takes (%s); the request has (%s)'
                % (
                    request.service,
                    request.method,
                    ', '.join(kind.__name__ for kind in expected),
                    ', '.join(type(value).__name__ for value in request.params),
                ),
                AMBIGUOUS_METHOD,
            )
        missing = [kind.__name__ for value, kind in zip(request.params, expected) if value is None]
        if missing:
            raise _failed_inside(
                ValueError(
                    'the %s of %s::%s is null' % (missing[0], request.service, request.method)
                )
            )
        return method(*request.params)


# ---- 13. Script execution ------------------------------------------------------------------------
# A script outlives the agent, so the agent is not its parent, and remembers nothing about it:
#
#     agent ── launcher ── supervisor ── script        (each ── a fork; the last two in a session
#                                                       of their own)
#
# What is known of a script lies in `<home>/Scripts/<ticket>/`, outside its workspace:
#
#     alive        a FIFO that is open in the process that has the script in hand: first the agent
#                  that prepares it, then its supervisor. Its end is an event for who reads it
#                  (POLLHUP), and a byte in it cancels the script
#     request      what was asked for, there once the workspace is whole; its supervisor holds a
#                  record lock on it
#     started      there once the script's process is about to be made: never made again. It names
#                  the script's session, and when that began
#     log          the lines so far, as the wire wants them: BSON entries, one after the other
#     result       the exit code, and the entries behind the log: the supervisor's last act
#
# The folder appears by a rename, with `alive` open already, and goes by a rename; `started` and
# `result` are renamed from files made ahead, so that a full disk does not keep them from coming.
# So the state is a function of the folder: with `result` the script has ended; with a living
# `alive` it waits, or runs when it has `started`; a dead one that has started ends with -46, and
# one that has not is launched again. A completed ticket is a symbolic link in
# `Scripts/.completed/HOUR` that points to its exit code, for a day.

#: No limit, as the original's client writes it: the most milliseconds that an int32 holds (wire
#: notes 3).
NO_MUTEX_TIMEOUT = 2147483.647

BOOTSTRAP = 'Bootstrap.sh'
DEFAULT_MUTEX = 'RunningScript'

FATAL_EXIT_CODE = -41  # could not run or log (wire notes 4)
CANCELED_EXIT_CODE = -1  # of a script that was cancelled while it ran, as in the captures
CANCELED_WAITING_EXIT_CODE = -43
TIMED_OUT_EXIT_CODE = -44
UNKNOWN_TICKET_EXIT_CODE = -45
UNKNOWN_RESULT_EXIT_CODE = -46

_TICKET_PATTERN = re.compile(r'[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}\Z')
#: Of a folder that is being made, or removed: no ticket begins so.
_NEW, _GONE = '.new-', '.gone-'
#: The system has too little of something at this moment: no statement about any script.
_STARVED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)


def check_ticket(task_id: Optional[str]) -> str:
    """A ticket's id, fit to be the name of a folder. Raises ServiceError."""
    if not isinstance(task_id, str) or not _TICKET_PATTERN.match(task_id):
        text = '%s is no script ticket: up to 100 letters, digits, - and _ are taken'
        raise _failed_inside(ValueError(text % printable(task_id, 40)))
    return task_id


def new_ticket() -> str:
    """A ticket for a script of our own asking: 128 random bits."""
    return secrets.token_hex(16)


class ScriptSpec(NamedTuple):
    """What a script is to run with, whichever service was asked."""

    ticket: str
    body: str
    task_id: str
    isolation: int
    mutex_name: str
    mutex_timeout: float  # seconds, 0 = no limit
    files: List[ScriptFile]
    arguments: str  # as text, to be appended to the command line
    by: Optional[str] = None  # the thumbprint of who asked, for the audit log
    sha256: str = ''  # of the body, for the same


def remove_tree(path: str) -> None:
    """Remove a folder as far as we may, following no symbolic link. Never raises."""
    import shutil

    with contextlib.suppress(OSError):
        if not stat.S_ISDIR(os.lstat(path).st_mode):  # what a script has put in its place
            os.unlink(path)
    shutil.rmtree(path, ignore_errors=True)
    if not os.path.lexists(path):
        return
    for folder, names, _ in os.walk(path):  # folders that their owner may not write, at first
        for name in names:
            if not os.path.islink(os.path.join(folder, name)):
                with contextlib.suppress(OSError):  # not ours
                    os.chmod(os.path.join(folder, name), 0o700)
    shutil.rmtree(path, ignore_errors=True)


def remove_folder(path: str) -> bool:
    """Have a folder be gone for everybody at once, then remove it; whether we were the one to. What
    can not be removed keeps the name of one that is gone. Raises OSError.
    """
    gone = os.path.join(os.path.dirname(path), _GONE + secrets.token_hex(8))
    try:
        os.rename(path, gone)
    except FileNotFoundError:
        return False
    remove_tree(gone)
    return True


def open_ours(path: str) -> Any:
    """Open a regular file of ours to read, unbuffered: nothing that stands in its place makes us
    wait. Raises OSError; ValueError for what is no file.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError('%s is not a file' % path)
    return open(descriptor, 'rb', buffering=0)


def read_small(path: str, limit: int = 1 << 16) -> bytes:
    """At most so many bytes of a file of ours. Raises as `open_ours`."""
    with open_ours(path) as file:
        return file.read(min(limit, os.fstat(file.fileno()).st_size))


class Liveness:
    """Whether any process has a FIFO open for writing, and when the last one ends, by whatever
    cause. Raises OSError.
    """

    def __init__(self, path: str):
        self._reader: Optional[int] = None
        flags = os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            # A reader that never saw a writer is told nothing (Linux): so we are one for a moment.
            writer = os.open(path, os.O_WRONLY | flags)
        except OSError as error:
            if error.errno not in (errno.ENXIO, errno.ENOENT, errno.ELOOP):
                raise
            return
        try:
            if stat.S_ISFIFO(os.fstat(writer).st_mode):
                self._reader = os.open(path, os.O_RDONLY | flags)
        except FileNotFoundError:
            pass  # it is being removed
        finally:
            os.close(writer)

    def __enter__(self) -> 'Liveness':
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._reader is not None:
            os.close(self._reader)

    def ended(self, seconds: float = 0) -> bool:
        """Wait for the end, no longer than that; whether it has come."""
        if self._reader is None:
            return True
        poll = select.poll()
        poll.register(self._reader, 0)
        return bool(poll.poll(seconds * 1000))


# -- the processes of a script, by Linux' /proc


def process_facts(pid: Any) -> List[bytes]:
    """The fields of /proc/PID/stat from the third on (proc(5)); none where it can not tell."""
    try:
        with open('/proc/%s/stat' % pid, 'rb') as file:
            return file.read().rpartition(b')')[2].split()
    except OSError:
        return []


def boot_id() -> bytes:
    try:
        with open('/proc/sys/kernel/random/boot_id', 'rb') as file:
            return file.read().strip()
    except OSError:
        return b'-'


def session_facts(pid: Any) -> bytes:
    """What names a session of this process for ever: its number, its start and the boot."""
    return b'%d %b %b\n' % (pid, (process_facts(pid) + [b'-'] * 20)[19], boot_id())


def _session_of(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return 0


def _environment_of(pid: int) -> List[bytes]:
    try:
        with open('/proc/%d/environ' % pid, 'rb') as file:
            return file.read().split(b'\0')
    except OSError:
        return []


def end_session(path: str) -> bool:
    """SIGKILL to all processes of the session that a script's `started` names; whether none is
    left. Nobody else's process is touched: where the session's leader is gone its number may be
    another's by now, and where it is not known yet no number helps; then a process must have the
    script's environment.
    """
    number, start, boot = 0, b'', boot_id()
    with contextlib.suppress(ValueError):
        facts = read_small(path).split()
        if not facts:
            return True  # no process of the script was made yet
        start, boot = facts[1:3] if len(facts) == 3 else (start, boot)
        number = int(facts[0])
    if boot != boot_id():
        return True  # the machine was started anew
    if not process_facts('self') or start == b'-':
        return False
    mark = os.fsencode('TentacleScriptTicket=' + os.path.basename(os.path.dirname(path)))
    for _ in range(100):
        leader = process_facts(number)
        if leader and leader[19] != start:
            return True  # the number is another's, so nobody was left
        pids = [int(pid) for pid in os.listdir('/proc') if pid.isdigit()]
        members = [pid for pid in pids if not number or _session_of(pid) == number]
        living = [pid for pid in members if process_facts(pid)[:1] not in ([], [b'Z'])]
        ours = [pid for pid in living if leader or mark in _environment_of(pid)]
        if not ours:
            return not (number and living)
        for pid in ours:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return False


def set_title(title: str) -> None:
    """Have `ps` show a title in the place of the command line, where that can be; never raises."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        begin, end = (int(field) for field in process_facts('self')[45:47])
        if 0 < begin < end:
            with open('/proc/self/mem', 'r+b', buffering=0) as memory:
                memory.seek(begin)
                memory.write(title.encode()[: end - begin - 1].ljust(end - begin, b'\0'))


def lower_oom_score() -> None:
    """Ask the kernel to kill others ahead of this process, where it may be asked."""
    with contextlib.suppress(OSError), open('/proc/self/oom_score_adj', 'wb', buffering=0) as file:
        file.write(b'-500')


# -- the folder of a script


class ScriptFolder:
    """The folder of one script. Any process may call; raises OSError, and takes nothing but ENOENT
    for "not there".
    """

    _RESULT_SIZE = 4096  # bytes: room for an exit code and a few lines

    def __init__(self, scripts: str, ticket: str):
        self.ticket = ticket
        self.path = os.path.join(scripts, ticket)

    def inner(self, name: str) -> str:
        return os.path.join(self.path, name)

    def has(self, name: str) -> bool:
        try:
            os.lstat(self.inner(name))
        except FileNotFoundError:
            return False
        return True

    def make(self) -> int:
        """Make a folder at this path, with a living `alive`; its descriptor, which keeps it so."""
        os.makedirs(self.path, mode=0o700)
        return self.hold()

    def hold(self) -> int:
        """Have `alive` living for as long as the descriptor is open."""
        with contextlib.suppress(FileExistsError):
            os.mkfifo(self.inner('alive'), 0o600)
        flags = os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(self.inner('alive'), flags)

    def is_alive(self) -> bool:
        with Liveness(self.inner('alive')) as liveness:
            return not liveness.ended()

    def has_no_supervisor(self) -> bool:
        """Of a script that has started: nobody has the request locked. True a moment before `alive`
        has ended for everybody.
        """
        import fcntl

        descriptor = os.open(self.inner('request'), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)

    def write_request(self, facts: Dict[str, Any]) -> None:
        """The last step of the preparation."""
        for name, size in (('started.new', 200), ('result.new', self._RESULT_SIZE)):
            with open(self.inner(name), 'wb') as file:
                file.write(b' ' * size)
        with open(self.inner('request.new'), 'w', encoding='utf-8') as text:
            json.dump(facts, text)
        os.rename(self.inner('request.new'), self.inner('request'))

    def request(self) -> Dict[str, Any]:
        """Raises also ValueError, for what is no request of ours."""
        facts = json.loads(read_small(self.inner('request'), LIMITS.request_bytes).decode())
        if not isinstance(facts, dict):
            raise ValueError('a request is a JSON object')
        return facts

    def result(self) -> Optional[Tuple[int, bytes]]:
        """(exit code, the log entries behind the log), None while there is no result."""
        try:
            code, _, entries = read_small(self.inner('result')).partition(b'\n')
            return int(code), entries
        except FileNotFoundError:
            return None
        except ValueError:  # somebody wrote it who is not we
            return UNKNOWN_RESULT_EXIT_CODE, b''

    def write_result(self, exit_code: int, lines: Iterable[Tuple[int, str]] = ()) -> None:
        """Whoever knows the end writes it, with (source, text) of the last lines of the log."""
        now = int(time.time() * 1000)
        content = b'%d\n' % exit_code
        for source, text in lines:
            content += encode_entry(source, now, printable(text, 1000).encode())
        mine = self.inner('result.' + secrets.token_hex(4))
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.inner('result.new'), mine)
        descriptor = os.open(mine, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, content)
            os.ftruncate(descriptor, len(content))
        finally:
            os.close(descriptor)
        os.rename(mine, self.inner('result'))

    def claim_start(self) -> bool:
        """Take the one right to start the script, or to say that it never will; False when that
        was taken.
        """
        try:
            os.rename(self.inner('started.new'), self.inner('started'))
        except FileNotFoundError:
            return False
        return True

    def ask_to_cancel(self) -> bool:
        """Tell whoever has the script in hand; False when there is nobody."""
        with Liveness(self.inner('alive')) as liveness:
            if liveness.ended():
                return False
            try:
                writer = os.open(self.inner('alive'), os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except FileNotFoundError:
                return False
            try:
                os.write(writer, b'c')
            except BlockingIOError:
                pass  # it has been told a thousand times
            finally:
                os.close(writer)
        return True

    def bury(self) -> None:
        """The supervisor of a script that had started is gone: end what is left of the script, and
        write the result that nobody knows.
        """
        text = 'The result of the script is unknown: its supervisor is gone'
        if not end_session(self.inner('started')):
            text += '. Processes of script %s may still run' % self.ticket
            logger.warning('Processes of script %s may still run', self.ticket)
        self.write_result(UNKNOWN_RESULT_EXIT_CODE, [(STDERR, text)])


def ticket_folders(scripts: str) -> List[ScriptFolder]:
    """The folders of all scripts that are not completed."""
    with contextlib.suppress(FileNotFoundError):
        names = os.listdir(scripts)
        return [ScriptFolder(scripts, name) for name in names if _TICKET_PATTERN.match(name)]
    return []


def descendants(root: int) -> List[int]:
    """The processes below a process; none where /proc can not tell."""
    found: List[int] = []
    parents = [root]
    while parents:
        pid = parents.pop()
        try:
            for thread in os.listdir('/proc/%d/task' % pid):
                with open('/proc/%d/task/%s/children' % (pid, thread)) as file:
                    children = [int(child) for child in file.read().split()]
                found += children
                parents += children
        except OSError:
            continue  # it has just ended
    return found


# -- completed tickets


def _completed_folder(scripts: str) -> str:
    return os.path.join(scripts, '.completed')


def completed_exit_code(scripts: str, ticket: str) -> Optional[int]:
    """The exit code of a completed ticket that is still remembered. Raises OSError."""
    folder = _completed_folder(scripts)
    with contextlib.suppress(FileNotFoundError):
        for hour in os.listdir(folder):
            with contextlib.suppress(FileNotFoundError, ValueError):
                return int(os.readlink(os.path.join(folder, hour, ticket)).split()[0])
    return None


def remember_completed(scripts: str, ticket: str, exit_code: int) -> None:
    """Atomic, and nothing is opened: a link whose target is exit code and time. Raises OSError."""
    now = time.time()
    link = os.path.join(_completed_folder(scripts), '%010d' % (now // 3600), ticket)
    with contextlib.suppress(FileExistsError):
        try:
            os.symlink('%d %d' % (exit_code, now), link)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(link), mode=0o700, exist_ok=True)
            os.symlink('%d %d' % (exit_code, now), link)


def forget_completed(scripts: str, limits: Limits = LIMITS) -> None:
    """Forget what was completed a day ago, and the oldest hours beyond a count. Raises OSError."""
    folder = _completed_folder(scripts)
    with contextlib.suppress(FileNotFoundError):
        hours = sorted(name for name in os.listdir(folder) if name.isdigit())
        counts = {hour: len(os.listdir(os.path.join(folder, hour))) for hour in hours}
        total = sum(counts.values())
        for hour in hours:
            is_old = int(hour) * 3600 < time.time() - limits.remembered - 3600
            if total > limits.remembered_tickets:
                logger.warning(
                    'More than %d scripts were completed within a day: the %d oldest are forgotten',
                    limits.remembered_tickets,
                    counts[hour],
                )
            elif not is_old:
                return
            total -= counts[hour]
            remove_folder(os.path.join(folder, hour))


# -- the log


def lines_were_lost(count: int) -> str:
    return '%d lines were lost here: the log could not be written' % count


def utf8(line: bytes) -> bytes:
    """A line with U+FFFD in the place of what is no UTF-8."""
    try:
        line.decode()
    except UnicodeDecodeError:
        line = line.decode('utf-8', 'replace').encode()
    return line


class LogWriter:
    """Appends to a script's log. One process at a time.

    A full disk does not stop a script, nor does a log that is longer than `limit` bytes: lines that
    can not be kept are counted, and it is said when there is room again, or at the end.
    """

    def __init__(self, path: str, limit: int = LIMITS.log_bytes):
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW
        self._descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._descriptor).st_size
        self._limit = limit
        self._kept = 0
        self._lost = 0  # lines of which the log does not say so
        self._is_full = False

    def append(self, source: int, lines: Sequence[bytes]) -> None:
        """Lines without their ends. Never raises."""
        now = int(time.time() * 1000)
        entries = [encode_entry(source, now, utf8(line)) for line in lines]
        if self._lost and not self._is_full:
            said = encode_entry(STDERR, now, lines_were_lost(self._lost).encode())
            if self._write([said]):
                self._lost = 0
        self._lost += len(entries) - self._write(entries)

    def say(self, source: int, *texts: str) -> None:
        self.append(source, [printable(text, 10000).encode() for text in texts])

    def _write(self, entries: List[bytes]) -> int:
        """How many of them, from the first on, are whole on the disk."""
        if self._is_full:
            return 0
        data = b''.join(entries)
        self._is_full = self._size + len(data) > self._limit
        written = 0
        with contextlib.suppress(OSError):
            written = os.write(self._descriptor, data[: max(self._limit - self._size, 0)])
        count = len(entries)
        if written < len(data):
            whole = count = 0
            while count < len(entries) and whole + len(entries[count]) <= written:
                whole += len(entries[count])
                count += 1
            if whole < written:
                os.ftruncate(self._descriptor, self._size + whole)
            written = whole
        self._size += written
        self._kept += count
        return count

    def close(self) -> List[Tuple[int, str]]:
        """(source, text) of what is to be said behind the log."""
        is_gone = not os.fstat(self._descriptor).st_nlink
        os.close(self._descriptor)
        if is_gone:
            text = '%d lines were lost: the log was removed while the script ran'
            return [(STDERR, text % (self._kept + self._lost))]
        if self._lost and self._is_full:
            text = '%d lines were not kept: the log of a script has %d bytes at most'
            return [(STDERR, text % (self._lost, self._limit))]
        return [(STDERR, lines_were_lost(self._lost))] if self._lost else []


class LineSplitter:
    """Bytes of one pipe to lines, which LF, CR LF or a lone CR end; a line that is longer than a
    limit is cut, and counted in `cuts`.
    """

    def __init__(self, limit: int = LIMITS.log_line):
        self._limit = limit
        self._parts: List[bytes] = []  # of the line that has no end yet
        self._size = 0
        self._after_cr = False
        self.cuts = 0

    def feed(self, data: bytes, final: bool = False) -> List[bytes]:
        """The lines that are whole now; with `final` also the last one that has no end."""
        if self._after_cr and data:
            data = data[data.startswith(b'\n') :]
            self._after_cr = False
        if b'\r' in data:
            self._after_cr = data.endswith(b'\r')
            data = data.replace(b'\r\n', b'\n').replace(b'\r', b'\n')
        *lines, rest = data.split(b'\n')
        if lines:
            lines[:1] = self._cut(b''.join(self._parts) + lines[0])
            self._parts, self._size = [], 0
        self._parts.append(rest)
        self._size += len(rest)
        if self._size > self._limit or (final and self._size):
            *cut, rest = self._cut(b''.join(self._parts))
            lines += cut + [rest] * final
            self._parts, self._size = ([], 0) if final else ([rest], len(rest))
        return lines

    def _cut(self, line: bytes) -> List[bytes]:
        if len(line) <= self._limit:
            return [line]
        self.cuts += 1
        return [line[i : i + self._limit] for i in range(0, len(line), self._limit)]


def _read_up_to(file: Any, size: int) -> Iterator[bytes]:
    while size > 0:
        data = file.read(min(size, 1 << 18))
        if not data:
            return
        size -= len(data)
        yield data


def _size_of_keys(count: int) -> int:
    """Bytes of the types, indices and NULs of so many elements of an array."""
    total, least, digits = 0, 0, 1
    while least < count:
        most = min(count, 10**digits)
        total += (most - least) * (digits + 2)
        least, digits = most, digits + 1
    return total


class LogReader:
    """Reads scripts' logs, for status answers. Any thread may call.

    Reading costs what is new: where the last answer about a script ended is kept as a hint, that
    the log can give again.
    """

    _MOST_HINTS = 1000

    def __init__(self, limits: Limits = LIMITS):
        self._limits = limits
        #: path -> inode, and (number, offset) of where the last answer began, and ended
        self._hints: 'OrderedDict[str, Tuple[int, Any]]' = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: str, after: int, tail: bytes = b'') -> Tuple[EncodedArray, int, bool]:
        """(the entries after the `after`-th, those of `tail` behind the log's, as elements of an
        array; how many there are; whether there are more). Raises OSError.
        """
        try:
            file = open_ours(path)
        except (FileNotFoundError, ValueError):  # it is being completed, or spoilt
            file = io.BytesIO()
        begin, end, number, count, more = self._measure(file, path, after)
        behind: List[bytes] = []
        if not more:
            with contextlib.suppress(ProtocolError):  # somebody wrote it who is not we
                behind = [entry for found in documents_in([tail]) for entry in found]
            skipped = max(after - number, 0)
            behind = behind[skipped if skipped <= len(behind) else 0 :]  # else the log was lost
        total = count + len(behind)

        def pieces() -> Iterator[bytes]:
            index = 0
            with file:
                file.seek(begin)
                for found in documents_in(_read_up_to(file, end - begin)):
                    yield array_of_entries(found, index)
                    index += len(found)
            if index != count:
                raise ConnectionLost('a log changed while it was sent: the connection is given up')
            yield array_of_entries(behind, index)

        size = end - begin + sum(map(len, behind)) + _size_of_keys(total)
        return EncodedArray(size, pieces), total, more

    def _measure(self, file: Any, path: str, after: int) -> Tuple[int, int, int, int, bool]:
        """(offset of the entry behind the `after`-th, offset and number of the last one that fits
        into an answer, how many these are, whether more follow)
        """
        inode = 0 if isinstance(file, io.BytesIO) else os.fstat(file.fileno()).st_ino
        with self._lock:
            known, places = self._hints.pop(path, (inode, ()))
        number, at = max((p for p in places if p[0] <= after and known == inode), default=(0, 0))
        file.seek(at)
        begin, first, more = at, number, False
        try:
            for found in documents_in(_read_up_to(file, sys.maxsize)):
                for document in found:
                    more = number > first and not self._fits(number - first, at - begin, document)
                    if more:
                        break
                    number, at = number + 1, at + len(document)
                    if number <= after:
                        begin, first = at, number
                if more:
                    break
        except ProtocolError as error:
            logger.error('%s is damaged behind its line %d: %s', path, number, str(error))
        with self._lock:
            self._hints[path] = inode, ((first, begin), (number, at))
            if len(self._hints) > self._MOST_HINTS:
                self._hints.popitem(last=False)
        return begin, at, number, number - first, more

    def _fits(self, count: int, size: int, document: bytes) -> bool:
        limits = self._limits
        return count < limits.log_answer_lines and size + len(document) <= limits.log_answer_bytes


_ARGUMENT_PART = re.compile(r'(\\*)("?)([^\\" \t]*)([ \t]*)')


def split_arguments(text: str) -> List[str]:
    """A command line's arguments as .NET splits them on POSIX: at blanks outside double quotes; a
    backslash is one but before a quote, and a doubled quote within quotes is one.
    """
    arguments: List[str] = []
    current: List[str] = []  # the parts of an argument; empty between two
    quoted = False
    position = 0
    while position < len(text):
        part = _ARGUMENT_PART.match(text, position)
        slashes, quote, plain, blanks = part.groups()  # type: ignore[union-attr]
        position += len(slashes) + len(quote)
        current.append(slashes[: len(slashes) // 2] if quote else slashes)
        if quote and len(slashes) % 2:
            current.append('"')
        elif quote and quoted and text[position : position + 1] == '"':
            current.append('"')
            position += 1
            continue
        elif quote:
            quoted = not quoted
        position += len(plain) + len(blanks)
        current.append(plain + blanks if quoted else plain)
        if blanks and not quoted:
            if slashes or quote or plain:
                arguments.append(''.join(current))
            current = []
    return arguments + [''.join(current)] if current else arguments


def find_shell() -> str:
    return '/bin/bash' if os.access('/bin/bash', os.X_OK) else '/bin/sh'


# -- the isolation mutex


class _Woken(Exception):
    """A signal came while a lock was waited for."""


class IsolationMutex:
    """A reader-writer lock by name, between processes: a record lock on a byte of a file of the
    home, which the kernel gives back when its holder ends. A script of full isolation is a writer.

    Fair: who waits holds the byte beside it, a turnstile, so new readers do not starve a writer.
    For single-threaded processes: the wait is the call itself, which signals end. Closing any
    descriptor of the file would give the locks back, so it is open once; behind `above`, since
    those of a process that is killed are closed in their order: who gets the lock then sees that
    the request of its last holder is locked no more.
    """

    _STEP = 5.0  # seconds: a signal just ahead of the call is not seen by it

    def __init__(self, path: str, name: str, above: int = -1):
        import fcntl

        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._file = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, above + 1)
        os.close(descriptor)
        self._byte = 2 * zlib.crc32(name.encode('utf-8', 'surrogatepass'))
        self._is_waiting = False

    def acquire(
        self,
        exclusive: bool,
        limit: float,
        is_cancelled: Callable[[], bool],
        on_wait: Callable[[], None],
    ) -> bool:
        """True with the lock; False after `limit` seconds, or when `is_cancelled`. `on_wait` is
        called once ahead of a wait.
        """
        import fcntl

        kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
        deadline = time.monotonic() + limit
        has_waited = False
        try:
            for mode, byte in ((fcntl.LOCK_EX, self._byte + 1), (kind, self._byte)):
                if self._try(mode, byte):
                    continue
                if not has_waited:
                    on_wait()
                    has_waited = True
                if not self._wait(mode, byte, deadline, is_cancelled):
                    return False
            return True
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, self._byte + 1)

    def _try(self, mode: int, byte: int) -> bool:
        import fcntl

        try:
            fcntl.lockf(self._file, mode | fcntl.LOCK_NB, 1, byte)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            return False
        return True

    def _wake(self, number: int, frame: Any) -> None:
        if self._is_waiting:
            self._is_waiting = False
            raise _Woken

    def _wait(
        self, mode: int, byte: int, deadline: float, is_cancelled: Callable[[], bool]
    ) -> bool:
        import fcntl

        wakers = (signal.SIGALRM, signal.SIGIO)
        before = [signal.signal(number, self._wake) for number in wakers]
        try:
            while not is_cancelled():
                left = min(deadline - time.monotonic(), self._STEP)
                if left <= 0:
                    return False
                try:
                    self._is_waiting = True
                    signal.setitimer(signal.ITIMER_REAL, left, self._STEP)
                    if not is_cancelled():  # its signal may have come too early to be heard
                        fcntl.lockf(self._file, mode, 1, byte)
                    self._is_waiting = False
                except _Woken:
                    pass
                if self._try(mode, byte):  # it may be ours already, signal or not
                    return True
            return False
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in zip(wakers, before):
                signal.signal(number, handler)


def _named(tasks: Sequence[str]) -> str:
    shown = ['[%s](~/app#/tasks/%s)' % (task, task) for task in tasks]
    return ', '.join(shown[:-1]) + ' and ' * (len(shown) > 1) + ''.join(shown[-1:])


def waiting_text(tasks: Sequence[str], own: str, is_full: bool) -> str:
    """Who is waited for, in the original's words (captures listening-isolation-*)."""
    end = ' requires that no other Octopus scripts are executing on this target at the same time.'
    if len(tasks) > 1:
        return 'Waiting on scripts in tasks %s to finish. This script' % _named(tasks) + end
    if own in tasks or not tasks:
        start = 'Waiting on another script in this task to finish as %s task'
        return start % ('this' if is_full else 'another') + end
    start = 'Waiting for the script in task %s to finish as %s script'
    return start % (_named(tasks), 'this' if is_full else 'that') + end


def still_running_text(tasks: Sequence[str]) -> str:
    """Whom one that gave up has waited for."""
    if not tasks:
        return ''
    text = ' Tasks %s are still running.' if len(tasks) > 1 else ' Task %s is still running.'
    return text % _named(tasks)


# -- the supervisor, a process of its own for each script


def find_prctl() -> Callable[..., Any]:
    """prctl(2) of Linux, or something that does nothing; loaded once, ahead of the supervisors."""
    try:
        import ctypes

        return ctypes.CDLL(None).prctl
    except (ImportError, OSError, AttributeError):
        return lambda *arguments: None


PR_SET_CHILD_SUBREAPER = 36
FIONREAD = 0x541B if sys.platform.startswith('linux') else 0x4004667F
_PIPE_STEP = 1 << 16  # what a pipe holds on Linux


class _Pump:
    """Puts the lines of one pipe of a script into its log."""

    def __init__(self, descriptor: int, source: int, log: LogWriter, line_limit: int):
        self.descriptor = descriptor
        self._source = source
        self._log = log
        self._splitter = LineSplitter(line_limit)
        self.ended = False
        os.set_blocking(descriptor, False)

    def take(self, most: int = _PIPE_STEP) -> int:
        """Take what there is, once; how much it was, -1 at the end of the pipe."""
        try:
            data = os.read(self.descriptor, min(most, _PIPE_STEP))
        except BlockingIOError:
            return 0
        self.ended = not data
        self.put(data, final=not data)
        return len(data) or -1

    def put(self, data: bytes, final: bool) -> None:
        cuts = self._splitter.cuts
        lines = self._splitter.feed(data, final)
        if lines:
            self._log.append(self._source, lines)
        if self._splitter.cuts > cuts:
            self._log.say(DEBUG, 'A line was too long, and is cut into several here')

    def take_what_is_there(self) -> None:
        """Take what is in the pipe at this moment, however much that is."""
        import fcntl

        (left,) = _INT32.unpack(fcntl.ioctl(self.descriptor, FIONREAD, bytes(4)))
        taken = 1
        while left > 0 and taken > 0:
            taken = self.take(left)
            left -= taken


def _spawn_session(command: List[str], environment: Dict[str, str], outputs: List[int]) -> int:
    """The id of a process that leads a session of its own, with these stdout and stderr. Raises
    OSError, ValueError.
    """
    try:
        actions = [(os.POSIX_SPAWN_DUP2, outputs[i], i + 1) for i in range(2)]
        return os.posix_spawn(
            command[0],
            command,
            environment,
            file_actions=actions,
            setsid=True,
            setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],
        )
    except (AttributeError, NotImplementedError):  # before Python 3.8, or an old libc
        import subprocess

        process = subprocess.Popen(
            command, env=environment, stdout=outputs[0], stderr=outputs[1], start_new_session=True
        )
        process.returncode = 0  # we reap it, not `subprocess`
        return process.pid


class Supervisor:
    """Sees one script through, from its turn at the isolation mutex to its result: the life of a
    single-threaded process.
    """

    _LAST_RESORT = 5.0  # seconds of SIGKILL: who is stuck in the kernel then is given up
    _LAST_WORDS = 0.3  # seconds for what is still written at a script's end, as with `>(tee)`,
    _LAST_BYTES = 1 << 20  # and so much of it: a child may write for ever

    def __init__(self, prctl: Callable[..., Any]):
        """What can be done before the request is known; nothing that it would cost time later."""
        prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # descendants of any session come back to us
        self._poll = select.poll()
        self._handlers: Dict[int, Callable[[], Any]] = {}
        reader, writer = os.pipe()
        for end in (reader, writer):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        self._register(reader, lambda: self._on_child(reader))
        self._script = 0  # its process id; reaped at the very end
        self._exit_code: Optional[int] = None
        self._cancelled_at: Optional[float] = None
        self._reaped = False

    def _register(self, descriptor: int, handler: Callable[[], Any]) -> None:
        self._handlers[descriptor] = handler
        self._poll.register(descriptor, select.POLLIN)

    def take(self, order: Dict[str, Any]) -> bool:
        """Take a script in hand; False when another has it, or it is gone."""
        import fcntl

        self._order = order
        self._folder = ScriptFolder(order['scripts'], order['ticket'])
        self._workspace = os.path.join(order['work'], order['ticket'])
        try:
            self._alive = self._folder.hold()
            self._lock = os.open(self._folder.inner('request'), os.O_RDWR | os.O_CLOEXEC)
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Read by this descriptor: closing another one of the file would give the lock back.
            size = min(os.fstat(self._lock).st_size, LIMITS.request_bytes)
            self._request = json.loads(os.pread(self._lock, size, 0).decode())
            return not self._folder.has('result')
        except (OSError, ValueError):
            return False

    def run(self) -> None:
        """See the script through, to its result."""
        log = LogWriter(self._folder.inner('log'), self._order['log_bytes'])
        try:
            exit_code, last = self._wait_and_run(log)
        except Exception as error:
            if not self._script and getattr(error, 'errno', 0) in _STARVED:
                return  # it is launched again by whoever asks for it
            self._end_all()
            text = 'The supervisor of the script failed: %s: %s' % (type(error).__name__, error)
            exit_code = UNKNOWN_RESULT_EXIT_CODE if self._script else FATAL_EXIT_CODE
            last = [(STDERR, text)]
        self._write_result(exit_code, log.close() + last)
        os.close(self._alive)  # ahead of all that the end of a process takes

    def _write_result(self, exit_code: int, lines: List[Tuple[int, str]]) -> None:
        try:
            self._folder.write_result(exit_code, lines)
        except FileNotFoundError:
            # Somebody removed the folder: it was completed, or the script's end is to be known.
            if completed_exit_code(self._order['scripts'], self._folder.ticket) is None:
                os.makedirs(self._folder.path, mode=0o700)
                self._folder.write_result(exit_code, lines)

    def _wait_and_run(self, log: LogWriter) -> Tuple[int, List[Tuple[int, str]]]:
        request = self._request
        path = os.path.join(self._order['scripts'], '.mutex')
        mutex = IsolationMutex(path, request['mutex_name'], self._lock)
        is_full = request['isolation'] == FULL_ISOLATION
        waited_for: List[str] = []

        def say_who_holds_it() -> None:
            set_title('tentacle.py script ' + self._folder.ticket)
            waited_for.extend(self._holders())
            text = waiting_text(waited_for, request['task_id'], is_full)
            log.say(STDOUT, '##octopus[stdout-wait]', text, '##octopus[stdout-default]')
            self._have_cancels_signalled()

        limit = request['mutex_timeout'] or float('inf')
        if not mutex.acquire(is_full, limit, self._is_cancelled, say_who_holds_it):
            if self._folder.claim_start():
                return self._end_of_wait(waited_for)
            os._exit(0)  # whoever has it says how it ends
        for folder in self._others():
            with contextlib.suppress(OSError):  # it is being removed
                if folder.has('started') and folder.has_no_supervisor() and not folder.result():
                    folder.bury()
        if not self._folder.claim_start():
            os._exit(0)
        if self._is_cancelled():
            return self._end_of_wait([])
        return self._run_script(log)

    def _others(self) -> List[ScriptFolder]:
        """The scripts of our mutex that have not ended."""
        found = []
        for folder in ticket_folders(self._order['scripts']):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                if folder.ticket != self._folder.ticket and not folder.has('result'):
                    if folder.request().get('mutex_name') == self._request['mutex_name']:
                        found.append(folder)
        return found

    def _holders(self) -> List[str]:
        """The tasks of the scripts that have our mutex; of one that waits where none has it yet."""
        others = [folder for folder in self._others() if folder.is_alive()]
        others = [folder for folder in others if folder.has('started')] or others[:1]
        with contextlib.suppress(OSError, ValueError, KeyError):
            return sorted({printable(folder.request()['task_id']) for folder in others})
        return []

    def _have_cancels_signalled(self) -> None:
        """A byte that comes in `alive` is a SIGIO, which ends a wait for the mutex."""
        import fcntl

        with contextlib.suppress(OSError, AttributeError):  # else it is seen at the next step
            fcntl.fcntl(self._alive, fcntl.F_SETOWN, os.getpid())
            flags = fcntl.fcntl(self._alive, fcntl.F_GETFL)
            fcntl.fcntl(self._alive, fcntl.F_SETFL, flags | os.O_ASYNC)

    def _is_cancelled(self) -> bool:
        return bool(select.select([self._alive], [], [], 0)[0])

    def _end_of_wait(self, waited_for: Sequence[str]) -> Tuple[int, List[Tuple[int, str]]]:
        if self._is_cancelled():
            code, text = CANCELED_WAITING_EXIT_CODE, 'was canceled before it could start.'
            last = 'Script execution canceled.'
        else:
            minutes = self._request['mutex_timeout'] // 60
            code, text = TIMED_OUT_EXIT_CODE, 'waited more than %d minutes and timed out.' % minutes
            last = 'Script execution timed out.'
        text = 'This task %s%s' % (text, still_running_text(waited_for))
        return code, [(STDOUT, text), (STDOUT, last)]

    # -- the script's process

    def _run_script(self, log: LogWriter) -> Tuple[int, List[Tuple[int, str]]]:
        shell = find_shell()
        texts = [
            'Executable directory is ' + os.path.dirname(shell),
            'Executable name or full path: ' + shell,
            "Starting %s in working directory '%s' using 'Unicode (UTF-8)' encoding running as '%s'"
            % (shell, self._workspace, user_name()),
        ]
        if shell != '/bin/bash':
            texts.append('There is no /bin/bash on this host: the script runs under ' + shell)
        log.say(DEBUG, *texts)
        ends = [os.pipe(), os.pipe()]
        command = [shell, os.path.join(self._workspace, BOOTSTRAP)]
        command += split_arguments(self._request['arguments'])
        error = self._spawn(command, [writer for _, writer in ends])
        set_title('tentacle.py script ' + self._folder.ticket)
        if error:
            return FATAL_EXIT_CODE, [(STDERR, 'The script could not be run: ' + error)]
        line_limit = self._order['line_limit']
        pumps = [_Pump(ends[i][0], source, log, line_limit) for i, source in enumerate((0, 1))]
        for pump in pumps:
            self._register(pump.descriptor, pump.take)
        self._register(self._alive, self._on_cancel)
        self._follow()
        self._hear_last_words(pumps)
        code = CANCELED_EXIT_CODE if self._cancelled_at is not None else self._exit_code or 0
        last = (DEBUG, 'Process %s in %s exited with code %d' % (shell, self._workspace, code))
        if self._cancelled_at is not None and self._has_children():
            text = 'Processes of the script could not be ended, and may still run'
            return code, [(STDERR, text), last]
        if not all(pump.ended for pump in pumps) and self._cancelled_at is None:
            text = 'A process that the script left behind holds its output: what comes from now on'
            log.say(DEBUG, text + ' is not shown')
        return code, [last]

    def _spawn(self, command: List[str], outputs: List[int]) -> str:
        """Make the script's process, and name its session in `started`. What went wrong, or ''.

        Where the system has no process to give at this moment, the script waits for one.
        """
        environment = dict(self._order['environment'], TentacleScriptTicket=self._folder.ticket)
        failure = OSError()
        with open(self._folder.inner('started'), 'r+b', buffering=0) as started:
            started.write(b'?\n')  # there may be one from here on
            for _ in range(600):
                try:
                    os.chdir(self._workspace)
                    self._script = _spawn_session(command, environment, outputs)
                    break
                except (OSError, ValueError) as error:
                    failure = error
                    if getattr(error, 'errno', 0) not in _STARVED:
                        break
                    time.sleep(0.1)
            for descriptor in outputs:
                os.close(descriptor)
            if not self._script:
                return str(failure)
            started.seek(0)
            started.write(session_facts(self._script))
        lower_oom_score()
        return ''

    def _follow(self) -> None:
        """Wait for the script's end; when it is cancelled for that of all its descendants too, with
        SIGKILL from the end of their time of grace on, until nothing is left.
        """
        while self._exit_code is None and self._cancelled_at is None:
            self._step(None)
        if self._cancelled_at is None:
            return
        kill_at = self._cancelled_at + self._order['grace']
        while self._exit_code is None or self._has_children():
            left = kill_at - time.monotonic()
            if left < -self._LAST_RESORT:
                return
            if left <= 0:
                self._end_all()
            self._step(max(left, 0.02))

    def _step(self, seconds: Optional[float]) -> None:
        """Wait for something to happen, no longer than that, and deal with it."""
        for descriptor, _ in self._poll.poll(None if seconds is None else seconds * 1000):
            if self._handlers[descriptor]() == -1:
                self._poll.unregister(descriptor)

    def _hear_last_words(self, pumps: List[_Pump]) -> None:
        """What is in the pipes, and what those who still hold them write at once."""
        for pump in pumps:
            pump.take_what_is_there()
        until = time.monotonic() + self._LAST_WORDS
        taken = 0
        while self._cancelled_at is None and taken < self._LAST_BYTES:
            left = until - time.monotonic()
            if left <= 0 or all(pump.ended for pump in pumps):
                break
            self._step(left)
            taken += _PIPE_STEP
        for pump in pumps:
            pump.put(b'', final=True)  # what is a line's beginning is a line now

    def _has_children(self) -> bool:
        """Reap what has ended. Each living descendant is below a child of ours, so without any
        child there is no descendant: more than a look at /proc could say.
        """
        self._reaped = True  # the script too: its id may be another's from now on
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return False
        return True

    def _end_all(self) -> None:
        until = time.monotonic() + 0.1
        while self._signal_all(signal.SIGKILL) and time.monotonic() < until:
            pass  # what is forked meanwhile is killed in the next round

    def _signal_all(self, number: int) -> int:
        """Signal the script's group and all descendants; how many these were."""
        found = descendants(os.getpid())
        targets = [(os.kill, pid) for pid in found]
        if self._script and not self._reaped:
            targets.insert(0, (os.killpg, self._script))
        for send, pid in targets:
            try:
                send(pid, number)
            except (ProcessLookupError, PermissionError):
                pass  # it has just ended; or runs as another user, and is out of our reach
        return len(found)

    def _on_cancel(self) -> None:
        os.read(self._alive, 4096)
        if self._cancelled_at is None:
            self._cancelled_at = time.monotonic()
            self._signal_all(signal.SIGTERM)

    def _on_child(self, descriptor: int) -> None:
        """Reap what has ended, but the script itself: its id must stay its own while we use it."""
        os.read(descriptor, 4096)
        while self._exit_code is None and not self._reaped:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            if ended.si_pid != self._script:
                os.waitpid(ended.si_pid, 0)
            elif ended.si_code == os.CLD_EXITED:
                self._exit_code = ended.si_status
            else:
                self._exit_code = 128 + ended.si_status  # as the shells and .NET have it


# -- the launcher, a process that forks the supervisors


def _be_supervisor(channel: socket.socket, note: int, prctl: Callable[..., Any]) -> None:
    """The forked process: take an order, say so through `note`, and see to it; never returns."""
    try:
        supervisor = Supervisor(prctl)
        line = channel.makefile('rb').readline()
        if not line:
            return
        os.setsid()  # until then it is one of the launcher's group, which is given up as a whole
        order = json.loads(line.decode())
        is_ours = supervisor.take(order)
        os.write(note, b't')
        os.close(note)
        channel.close()
        os.dup2(1, 2)  # who reads the agent's stderr to its end waits for no script
        if is_ours:
            supervisor.run()
    finally:
        os._exit(0)


def run_launcher(channel: socket.socket) -> None:
    """The launcher's life: keep a supervisor in waiting, and answer with a byte when it has taken
    an order (a line of JSON); until the agent is gone.

    It is single-threaded, so that forking is sound, and forks ahead, so that nobody waits for it.
    """
    import fcntl  # noqa: F401 - loaded here once, for all supervisors
    import gc

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)  # nohup and cron ignore some: scripts shall not
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # supervisors that end need no reaping
    prctl = find_prctl()
    user_name()  # looked up once, for all supervisors
    gc.collect()
    getattr(gc, 'freeze', int)()  # the supervisors share these pages as long as nobody writes them
    while True:
        reader, writer = os.pipe()
        try:
            is_child = os.fork() == 0
        except OSError:
            return  # the agent will start another launcher when there is room
        if is_child:
            os.close(reader)
            _be_supervisor(channel, writer, prctl)
        os.close(writer)
        taken = os.read(reader, 1)
        os.close(reader)
        if not taken:
            return  # the agent is gone; or the supervisor, and the agent must know what it had
        channel.sendall(taken)


class Launcher:
    """The agent's end of a launcher process, which is started when it is first needed, and again
    when it is gone. Any thread may call.

    It runs the agent's own code, whatever is on the disk by then. `descriptors` is the soft limit
    that scripts get, None for the agent's.
    """

    _ATTEMPTS = 3

    def __init__(self, descriptors: Optional[int] = None, limits: Limits = LIMITS):
        self._descriptors = descriptors
        self._limits = limits
        self._lock = threading.Lock()
        self._process: Any = None  # subprocess.Popen
        self._channel: Optional[socket.socket] = None

    def launch(self, order: Dict[str, Any]) -> None:
        """Have a supervisor take an order. Raises OSError when none does; one may have taken it all
        the same, and a second one that gets it leaves.
        """
        line = json.dumps(order).encode() + b'\n'
        for attempt in range(self._ATTEMPTS):
            with self._lock:
                try:
                    if self._channel is None:
                        self._start()
                    self._ask(line)
                    return
                except OSError as error:
                    self._discard()
                    if attempt == self._ATTEMPTS - 1 or error.errno in _STARVED:
                        raise
                    logger.warning('The launcher is gone (%s)', error)

    def _ask(self, line: bytes) -> None:
        channel = self._channel
        assert channel is not None
        channel.settimeout(self._limits.launch)
        channel.sendall(line)
        if channel.recv(1) != b't':
            raise ConnectionResetError(errno.ECONNRESET, 'it left without an answer')

    def _start(self) -> None:
        import subprocess

        ours, theirs = socket.socketpair()
        try:
            with theirs, open(code_descriptor(), 'rb', buffering=0) as code:
                self._process = subprocess.Popen(
                    code_command(code.fileno(), '_launcher', str(self._descriptors or '')),
                    stdin=theirs,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[code.fileno()],
                    start_new_session=True,
                )
        except BaseException:
            ours.close()
            raise
        self._channel = ours

    def _discard(self) -> None:
        """Let the launcher and the supervisor in waiting go, should they hang by SIGKILL; those
        that have a script are not of its group.
        """
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is not None:
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def close(self) -> None:
        with self._lock:
            self._discard()


# -- the agent's view


class ScriptStatus(NamedTuple):
    state: int  # PENDING, RUNNING or COMPLETE
    exit_code: int
    tail: bytes = b''  # the entries behind the log


def _age(path: str) -> float:
    """Seconds since a file was written; negative for what is not there."""
    try:
        return time.time() - os.lstat(path).st_mtime
    except FileNotFoundError:
        return -1


def patiently(function: Callable[[], Any]) -> Any:
    """Try again for some seconds where the system has too little of something: what a peer is told
    would be the end of its script.
    """
    deadline = time.monotonic() + 10
    while True:
        try:
            return function()
        except (OSError, MemoryError, ImportError) as error:
            is_starved = getattr(error, 'errno', errno.ENOMEM) in _STARVED
            if not is_starved or time.monotonic() > deadline:
                raise
            time.sleep(0.1)


class Scripts:
    """The scripts of a home, by ticket, for every service that runs scripts. Any thread may call;
    other agents may have the same home. Raises OSError where the system has too little of
    something, and states nothing then.

    `environment` gives a script's environment at its start, `name` that of the agent's record, and
    `other_agents` those of the others.
    """

    def __init__(
        self,
        home: str,
        environment: Callable[[], Dict[str, str]],
        launcher: Launcher,
        limits: Limits = LIMITS,
        name: Callable[[], str] = lambda: '',
        other_agents: Callable[[], Container[str]] = lambda: (),
    ):
        self._limits = limits
        self._environment = environment
        self._launcher = launcher
        self._name = name
        self._other_agents = other_agents
        self._work = os.path.join(home, 'Work')
        self._scripts = os.path.join(home, 'Scripts')
        self._log = LogReader(limits)
        self._completed = itertools.count(1)
        self._told: Set[str] = set()  # folders of which the log says that they can't be removed
        os.makedirs(self._work, mode=0o700, exist_ok=True)
        os.makedirs(self._scripts, mode=0o700, exist_ok=True)

    # -- for the services

    def start(self, spec: ScriptSpec) -> None:
        """Start a script, or leave it at the one that has this ticket already. Raises ServiceError.
        """
        deadline = time.monotonic() + self._limits.start_wait
        while patiently(lambda: self.status(spec.ticket)) is None:
            hold = patiently(lambda: self._claim(spec.ticket))
            if hold is not None:
                try:
                    self._begin(spec)
                finally:
                    os.close(hold)
        folder = self._folder(spec.ticket)
        while folder.is_alive() and not folder.has('request') and time.monotonic() < deadline:
            time.sleep(0.02)  # another call prepares it

    def status(self, ticket: str) -> Optional[ScriptStatus]:
        """How a script stands, which is launched, or ended, where that was left undone; None for a
        ticket that was never heard of, or more than a day ago.
        """
        folder = self._folder(ticket)
        is_alive = folder.is_alive()  # asked first: who ends wrote a result before
        result = folder.result()
        if result is not None:
            return ScriptStatus(COMPLETE, *result)
        if is_alive:
            return ScriptStatus(RUNNING if folder.has('started') else PENDING, 0)
        if folder.has('started'):
            folder.bury()
            logger.warning('Script %s has lost its supervisor', ticket)
            return ScriptStatus(COMPLETE, *(folder.result() or (UNKNOWN_RESULT_EXIT_CODE, b'')))
        if folder.has('request'):
            self._launch_again(folder)
            return ScriptStatus(PENDING, 0)
        if folder.has(''):
            self._discard_unprepared(folder)
        exit_code = completed_exit_code(self._scripts, ticket)
        return None if exit_code is None else ScriptStatus(COMPLETE, exit_code)

    def log(self, ticket: str, after: int, tail: bytes) -> Tuple[EncodedArray, int, bool]:
        """As `LogReader.read`."""
        return self._log.read(self._folder(ticket).inner('log'), after, tail)

    def wait(self, ticket: str, seconds: float) -> None:
        """Wait for the end of whoever has a script in hand, no longer than that."""
        with Liveness(self._folder(ticket).inner('alive')) as liveness:
            liveness.ended(seconds)

    def cancel(self, ticket: str) -> None:
        """Have a script that waits or runs end; returns at once."""
        status = self.status(ticket)
        if status is not None and status.state != COMPLETE:
            audit('script-cancelled', ticket=ticket)
            folder = self._folder(ticket)
            if not folder.ask_to_cancel() and folder.has('request') and folder.claim_start():
                text = 'This task was canceled before it could start.'
                folder.write_result(CANCELED_WAITING_EXIT_CODE, [(STDOUT, text)])

    def complete(self, ticket: str) -> None:
        """End a script that still runs, remove what there is of it and remember its exit code."""
        status = self.status(ticket)
        if status is not None and status.state != COMPLETE:
            self.cancel(ticket)
            self.wait(ticket, self._limits.cancelled_script)
            status = self.status(ticket)
        folder = self._folder(ticket)
        if status is None or not folder.has(''):
            return
        if status.state != COMPLETE:
            raise TentacleError('Script %s does not end: it is removed when it has' % ticket)
        try:
            facts = self._facts(folder.request())
        except (OSError, ValueError):
            facts = {'ticket': ticket}
        self._remove(os.path.join(self._work, ticket))
        with contextlib.suppress(FileNotFoundError):
            os.unlink(folder.inner('log'))  # on a full disk, what follows needs its room
        remember_completed(self._scripts, ticket, status.exit_code)
        if self._remove(folder.path):
            logger.info('Script %s ended with exit code %d', ticket, status.exit_code)
            audit('script-ended', exit_code=status.exit_code, **facts)
        if next(self._completed) % 1000 == 0:
            forget_completed(self._scripts, self._limits)

    def has_work(self) -> bool:
        """Whether a script of no other agent runs or waits, or has ended a short while ago and is
        not completed.
        """
        others = self._other_agents()
        for folder in ticket_folders(self._scripts):
            with contextlib.suppress(OSError, ValueError):
                is_recent = _age(folder.inner('result')) < self._limits.acknowledge
                if is_recent and folder.request().get('agent') not in others:
                    return True
        return False

    # -- the steps of a start

    def _folder(self, ticket: str) -> ScriptFolder:
        return ScriptFolder(self._scripts, ticket)

    def _claim(self, ticket: str) -> Optional[int]:
        """Be the one to prepare a script; what keeps it living meanwhile. None: it has a folder, or
        had one.
        """
        new = ScriptFolder(self._scripts, _NEW + secrets.token_hex(8))
        hold = new.make()
        folder = self._folder(ticket)
        try:
            os.rename(new.path, folder.path)
        except OSError as error:
            os.close(hold)
            remove_tree(new.path)
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return None
            raise
        if completed_exit_code(self._scripts, ticket) is not None:
            os.close(hold)
            self._remove(folder.path)
            return None
        return hold

    def _begin(self, spec: ScriptSpec) -> None:
        """Prepare a script that is ours to prepare, and hand it to a supervisor."""
        folder = self._folder(spec.ticket)
        workspace = os.path.join(self._work, spec.ticket)
        try:
            os.makedirs(self._work, mode=0o700, exist_ok=True)
            os.mkdir(workspace, 0o700)
        except OSError:  # a folder that is not ours, or no room
            self._remove(folder.path)
            raise
        try:
            self._write_workspace(workspace, spec)
            isolation = 'FullIsolation' if spec.isolation == FULL_ISOLATION else 'NoIsolation'
            text = 'Acquiring isolation mutex %s with %s in %s'
            text %= (spec.mutex_name, isolation, spec.task_id)
            log = LogWriter(folder.inner('log'))
            log.say(STDOUT, '##octopus[stdout-verbose]', text, '##octopus[stdout-default]')
            log.close()
            request = dict(spec._replace(body='', files=[])._asdict(), agent=self._name())
            folder.write_request(request)
        except BaseException:
            self._remove(workspace)
            self._remove(folder.path)
            raise
        logger.info('Script %s of %s starts', spec.ticket, printable(spec.task_id))
        files = [printable(file.name) for file in spec.files]
        audit('script-started', files=files, **self._facts(request))
        self._launch(folder)

    @staticmethod
    def _facts(request: Dict[str, Any]) -> Dict[str, Any]:
        """What the audit log says of a script."""
        return {
            'thumbprint': request['by'],
            'ticket': request['ticket'],
            'task': printable(request['task_id']),
            'sha256': request['sha256'],
        }

    def _write_workspace(self, path: str, spec: ScriptSpec) -> None:
        """The script and its files. Raises ServiceError, OSError."""
        with open(os.path.join(path, BOOTSTRAP), 'w', encoding='utf-8', newline='\n') as file:
            file.write(spec.body.replace('\r\n', '\n'))
        os.chmod(os.path.join(path, BOOTSTRAP), 0o700)
        for script_file in spec.files:
            self._write_file(path, script_file)

    @staticmethod
    def _write_file(workspace: str, file: ScriptFile) -> None:
        """Put a file beside the script. Raises ServiceError for a name that leads elsewhere."""
        name = file.name or ''
        is_reserved = name in ('', '.', '..', BOOTSTRAP)
        if is_reserved or set('/\\\0') & set(name) or file.contents is None:
            text = '%s can not be the name of a file of a script' % printable(name, 100)
            raise _failed_inside(ValueError(text))
        require_room(workspace, file.contents.length, LIMITS)
        with file.contents.open() as source, open(os.path.join(workspace, name), 'xb') as target:
            if file.encryption_password is not None:
                encrypt_script_file(source, target, file.encryption_password)
                return
            pump(source, target.write, file.contents.length)

    def _launch(self, folder: ScriptFolder) -> None:
        """Hand a prepared script to a supervisor. When that fails for now, it is tried again by
        whoever asks for the script.
        """
        order = {
            'scripts': self._scripts,
            'work': self._work,
            'ticket': folder.ticket,
            'environment': self._environment(),
            'grace': self._limits.cancel_grace,
            'line_limit': self._limits.log_line,
            'log_bytes': self._limits.log_bytes,
        }
        try:
            self._launcher.launch(order)
        except (OSError, MemoryError, ImportError) as error:
            logger.error('Script %s can not be started now: %s', folder.ticket, error)
            is_for_good = getattr(error, 'errno', 0) in (errno.ENOENT, errno.EACCES, errno.ENOEXEC)
            if is_for_good and folder.claim_start():
                text = 'The script could not be started: %s' % error
                folder.write_result(FATAL_EXIT_CODE, [(STDERR, text)])

    def _launch_again(self, folder: ScriptFolder) -> None:
        """Nobody has a prepared script in hand: launcher or supervisor died ahead of its start."""
        hold = folder.hold()
        try:
            folder.request()
            self._launch(folder)
        except FileNotFoundError:
            pass  # it is being removed
        except ValueError as error:
            if folder.claim_start():
                text = 'What was asked for can not be read any more: %s' % error
                folder.write_result(FATAL_EXIT_CODE, [(STDERR, text)])
        finally:
            os.close(hold)

    def _discard_unprepared(self, folder: ScriptFolder) -> None:
        """The agent that prepared it is gone: its caller was never told of it."""
        import fcntl

        descriptor = os.open(
            os.path.join(self._scripts, '.lock'), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # or we took away what another makes anew
            if not (folder.is_alive() or folder.has('request') or folder.has('result')):
                self._remove(os.path.join(self._work, folder.ticket))
                self._remove(folder.path)
        finally:
            os.close(descriptor)

    def _remove(self, path: str) -> bool:
        """Whether we were the one to remove a folder; what can not be removed is left for the
        cleaner, and told of once.
        """
        try:
            return remove_folder(path)
        except OSError as error:
            if error.errno in _STARVED:
                raise
            self._tell_once(path, error)
            return False

    def _tell_once(self, path: str, error: Any) -> None:
        if path not in self._told:
            self._told.add(path)
            logger.warning('%s can not be removed, and is left for now: %s', path, error)

    # -- the cleaner

    def clean(self, older_than: float) -> None:
        """Look after all scripts: start or end what was left undone, remove what nobody completed
        for so many seconds, and what is left of what was removed. Never raises.
        """
        try:
            for path in (self._work, self._scripts, _completed_folder(self._scripts)):
                self._remove_rests(path)
            for folder in ticket_folders(self._scripts):
                try:
                    self._look_after(folder, older_than)
                except (OSError, TentacleError) as error:
                    self._tell_once(folder.path, error)
            for name in os.listdir(self._work):
                path = os.path.join(self._work, name)
                is_script = _TICKET_PATTERN.match(name) and not self._folder(name).has('')
                # The original's have a log, which is written as long as they run.
                ages = [_age(os.path.join(path, file)) for file in (BOOTSTRAP, 'Output.log')]
                if is_script and ages[0] >= older_than and not 0 <= ages[1] < older_than:
                    self._remove(path)
            forget_completed(self._scripts, self._limits)
        except OSError as error:
            logger.error('Old scripts can not be removed: %s', error)

    def _remove_rests(self, folder: str) -> None:
        """What a kill left of folders that were being made, or removed; tried again each time."""
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(folder):
                path = os.path.join(folder, name)
                if name.startswith(_GONE) or (name.startswith(_NEW) and _age(path) > 3600):
                    remove_tree(path)
                    if os.path.lexists(path):
                        self._tell_once(path, 'what is in it belongs to another user')

    def _look_after(self, folder: ScriptFolder, older_than: float) -> None:
        """A script that ended long ago has an hour's notice: the clock may have jumped."""
        status = self.status(folder.ticket)
        is_over = status is not None and status.state == COMPLETE
        if not is_over or _age(folder.inner('result')) < older_than:
            return
        try:
            since = time.time() - float(read_small(folder.inner('old')))
        except FileNotFoundError:
            with open(folder.inner('old'), 'w') as file:
                file.write('%f' % time.time())
            return
        except ValueError:
            since = older_than
        if since >= min(older_than, 3600):
            self.complete(folder.ticket)
            logger.info('Script %s was removed: nobody completed it', folder.ticket)


# ---- 14. Tentacle services -----------------------------------------------------------------------


class CapabilitiesService:
    """`ICapabilitiesServiceV2`"""

    def __init__(self, capabilities: List[str]):
        self._capabilities = capabilities

    @exposed('GetCapabilities')
    def get_capabilities(self) -> CapabilitiesResponseV2:
        return CapabilitiesResponseV2(supported_capabilities=list(self._capabilities))


def _spec(ticket: str, command: Any) -> ScriptSpec:
    """What to run for a start command of either version."""
    body = {name.lower(): text for name, text in command.scripts.items()}.get(
        'bash', command.script_body
    )
    return ScriptSpec(
        ticket,
        body or '',
        command.task_id or '',
        command.isolation,
        printable(command.mutex_name or DEFAULT_MUTEX),
        min(max(command.mutex_timeout or 0, 0), NO_MUTEX_TIMEOUT),
        command.files,
        ' '.join(command.arguments),
        getattr(caller, 'thumbprint', None),
        hashlib.sha256((body or '').encode('utf-8', 'surrogatepass')).hexdigest(),
    )


class _ScriptService:
    """What both script services do; `status_type` is the contract of their answers, and
    `unknown_exit_code` that of a ticket nobody knows.
    """

    status_type: Any
    unknown_exit_code: int

    def __init__(self, scripts: Scripts, limits: Limits = LIMITS):
        self._scripts = scripts
        self._limits = limits

    @staticmethod
    def _ticket(command: Any) -> str:
        return (command.ticket and command.ticket.task_id) or ''

    def _status(self, ticket: str, after: int) -> Any:
        """A script's status answer; complete only together with the last of its log."""
        after = max(after, 0)
        known = _TICKET_PATTERN.match(ticket)
        status = patiently(lambda: self._scripts.status(ticket)) if known else None
        if status is None:
            status = ScriptStatus(COMPLETE, self.unknown_exit_code)
            logs, count, more = EncodedArray(0, list), 0, False
        else:
            logs, count, more = patiently(lambda: self._scripts.log(ticket, after, status.tail))
        return self.status_type(
            ticket=ScriptTicket(task_id=ticket),
            logs=LogEntries(logs),
            next_log_sequence=after + count,
            state=RUNNING if more else status.state,
            exit_code=0 if more else status.exit_code,
        )

    def _cancel(self, ticket: str, after: int) -> Any:
        if _TICKET_PATTERN.match(ticket):
            patiently(lambda: self._scripts.cancel(ticket))
        return self._status(ticket, after)

    def _complete(self, ticket: str) -> None:
        if _TICKET_PATTERN.match(ticket):
            patiently(lambda: self._scripts.complete(ticket))


class ScriptServiceV2(_ScriptService):
    """`IScriptServiceV2`: the ticket is the caller's, so a call may be repeated."""

    status_type = ScriptStatusResponseV2
    unknown_exit_code = UNKNOWN_TICKET_EXIT_CODE

    @exposed('StartScript', StartScriptCommandV2)
    def start_script(self, command: StartScriptCommandV2) -> ScriptStatusResponseV2:
        ticket = check_ticket(command.ticket and command.ticket.task_id)
        self._scripts.start(_spec(ticket, command))
        wait = min(max(command.duration_to_wait or 0, 0), self._limits.start_wait)
        if wait:
            self._scripts.wait(ticket, wait)
        return self._status(ticket, 0)

    @exposed('GetStatus', ScriptStatusRequestV2)
    def get_status(self, request: ScriptStatusRequestV2) -> ScriptStatusResponseV2:
        return self._status(self._ticket(request), request.last_log_sequence)

    @exposed('CancelScript', CancelScriptCommandV2)
    def cancel_script(self, command: CancelScriptCommandV2) -> ScriptStatusResponseV2:
        return self._cancel(self._ticket(command), command.last_log_sequence)

    @exposed('CompleteScript', CompleteScriptCommandV2)
    def complete_script(self, command: CompleteScriptCommandV2) -> None:
        self._complete(self._ticket(command))


class ScriptService(_ScriptService):
    """`IScriptService`, the older one: the ticket is ours."""

    status_type = ScriptStatusResponse
    unknown_exit_code = 0

    @exposed('StartScript', StartScriptCommand)
    def start_script(self, command: StartScriptCommand) -> ScriptTicket:
        ticket = time.strftime('%Y%m%d%H%M%S-') + secrets.token_hex(8)
        self._scripts.start(_spec(ticket, command))
        return ScriptTicket(task_id=ticket)

    @exposed('GetStatus', ScriptStatusRequest)
    def get_status(self, request: ScriptStatusRequest) -> ScriptStatusResponse:
        return self._status(self._ticket(request), request.last_log_sequence)

    @exposed('CancelScript', CancelScriptCommand)
    def cancel_script(self, command: CancelScriptCommand) -> ScriptStatusResponse:
        return self._cancel(self._ticket(command), command.last_log_sequence)

    @exposed('CompleteScript', CompleteScriptCommand)
    def complete_script(self, command: CompleteScriptCommand) -> ScriptStatusResponse:
        status = self._status(self._ticket(command), command.last_log_sequence)
        self._complete(self._ticket(command))
        return status


class UploadJournal:
    """Remembers the temporary files of uploads, so that those of an agent that was killed do not
    stay.

    An entry is a file in `folder` that holds the path of one, and is locked while its upload lives.
    """

    def __init__(self, folder: str):
        self._folder = folder

    @contextlib.contextmanager
    def entry(self, path: str) -> Iterator[None]:
        """Keep a path in mind for as long as this lasts. Raises OSError."""
        import fcntl

        os.makedirs(self._folder, mode=0o700, exist_ok=True)
        name = os.path.join(self._folder, secrets.token_hex(8))
        while True:
            descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.path.exists(name):
                break
            os.close(descriptor)  # another agent's `clean` was here between the two
        try:
            os.write(descriptor, os.fsencode(path))
            yield
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            os.close(descriptor)

    def clean(self) -> None:
        """Remove what uploads have left whose agent is gone. Never raises."""
        import fcntl

        if not os.path.isdir(self._folder):
            return
        for name in os.listdir(self._folder):
            with contextlib.suppress(OSError), open(os.path.join(self._folder, name), 'rb') as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path = os.fsdecode(file.read())
                if os.path.basename(path).startswith(TEMPORARY_PREFIX) and os.path.lexists(path):
                    os.unlink(path)
                    logger.info('%s of an upload that was broken off was removed', printable(path))
                os.unlink(file.name)


#: Opens a folder to go through it, where reading it is not allowed.
_O_FOLDER = os.O_DIRECTORY | os.O_CLOEXEC | getattr(os, 'O_PATH', os.O_RDONLY)


class FileTransferService:
    """`IFileTransferService`: whole files, by path; relative paths are under the home directory.

    With `root` no file outside that folder is read or written.
    """

    def __init__(
        self,
        home: str,
        journal: UploadJournal,
        root: Optional[str] = None,
        limits: Limits = LIMITS,
    ):
        self._home = home
        self._journal = journal
        self._root = root and os.path.realpath(root)
        self._limits = limits

    def _full_path(self, remote_path: str) -> str:
        path = remote_path.replace('\\', '/')
        if '\0' in path:
            raise TentacleError('%s is not the name of a file' % printable(path))
        full_path = os.path.normpath(os.path.join(self._home, path))
        if path.endswith('/') or os.path.isdir(full_path):
            raise TentacleError(
                '%s is a directory: name a file. A whole directory goes as an archive, made and '
                'unpacked by tar in a script' % full_path
            )
        return full_path

    @contextlib.contextmanager
    def _place(self, path: str, make: bool = False) -> Iterator[Tuple[int, str]]:
        """(descriptor of its folder, name there) of a file, with all symbolic links followed.

        Raises TentacleError when that is outside the root, OSError when it is not there.
        """
        real_path = os.path.realpath(path)
        folder, name = os.path.split(real_path)
        if self._root is not None and os.path.commonpath([self._root, real_path]) != self._root:
            raise TentacleError(
                '%s is outside %s, and this tentacle reads and writes files there alone '
                '(--files-root)'
                % (path if path == real_path else path + ' -> ' + real_path, self._root)
            )
        if make:
            os.makedirs(self._root or folder, exist_ok=True)
        descriptor = os.open(self._root or folder, _O_FOLDER)
        try:
            # From the root on without following a link, should one have come in between.
            inside = os.path.relpath(folder, self._root) if self._root else '.'
            for part in inside.split('/'):
                if make and part != '.':
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, dir_fd=descriptor)
                deeper = os.open(part, _O_FOLDER | os.O_NOFOLLOW, dir_fd=descriptor)
                os.close(descriptor)
                descriptor = deeper
            yield descriptor, name
        finally:
            os.close(descriptor)

    @exposed('UploadFile', str, DataStream)
    def upload_file(self, remote_path: str, upload: DataStream) -> UploadResult:
        path = self._full_path(remote_path)
        digest = sha1()

        def keep(part: memoryview) -> None:
            digest.update(part)
            write_soon(target, part)

        with self._place(path, make=True) as (folder, name):
            details = file_details(folder, name, path)
            real_folder = os.path.dirname(os.path.realpath(path))
            require_room(real_folder, upload.length, self._limits)
            temporary = TEMPORARY_PREFIX + secrets.token_hex(8)
            with self._journal.entry(os.path.join(real_folder, temporary)):
                with replacing(folder, name, temporary, details) as target:
                    pump(upload.open(), keep, upload.length)
        audit('file-written', path=path, bytes=upload.length, sha1=digest.hexdigest())
        return UploadResult(full_path=path, hash=digest.hexdigest(), length=upload.length)

    @exposed('DownloadFile', str)
    def download_file(self, remote_path: str) -> Optional[DataStream]:
        path = self._full_path(remote_path)
        try:
            with self._place(path) as (folder, name):
                if file_details(folder, name, path) is None:
                    return None
                # What it is may have changed since: a FIFO must not hold us up.
                flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
                file = open(os.open(name, flags, dir_fd=folder), 'rb', buffering=0)
        except (FileNotFoundError, NotADirectoryError):
            return None
        details = os.fstat(file.fileno())
        if not stat.S_ISREG(details.st_mode):
            file.close()
            raise TentacleError('%s is not a file' % path)
        audit('file-read', path=path, bytes=details.st_size)
        return DataStream(details.st_size, lambda: file)  # type: ignore[arg-type,return-value]


_NO_LOCKS = (
    'The locks of the file system of %s do not work, so scripts could run twice: choose a folder '
    'on another one with --home DIR'
)


def _lock(descriptor: int, kind: str = 'flock') -> bool:
    """Try to lock a file of ours, by flock or lockf; False when another has it. Raises
    TentacleError.
    """
    import fcntl

    try:
        getattr(fcntl, kind)(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _STARVED:
            raise
        raise TentacleError(_NO_LOCKS % 'the home' + ' (%s)' % error.strerror)


class AgentRecord:
    """`<home>/agents/PID`, which says who runs here (verb, arguments, since, version), and is
    locked (flock) as long as that lasts.

    Raises TentacleError where the home's file system has no locks that work.
    """

    def __init__(self, home: str, verb: str, arguments: str):
        self._folder = os.path.join(home, 'agents')
        os.makedirs(self._folder, mode=0o700, exist_ok=True)
        facts = {'pid': os.getpid(), 'verb': verb, 'arguments': arguments}
        facts.update(since=iso_time(int(time.time() * 1000)), version=__version__)
        self._descriptor = -1
        try:
            for number in itertools.count():
                self.name = str(os.getpid()) + '-%d' % number * bool(number)
                self._descriptor = self._open(self.name)
                if _lock(self._descriptor) and self._is_there():
                    break
                os.close(self._descriptor)
            with open(self._open(self.name), 'rb') as other:
                if _lock(other.fileno()) or not _lock(self._descriptor, 'lockf'):
                    raise TentacleError(_NO_LOCKS % home)
        except TentacleError:
            self.close()
            raise
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, json.dumps(facts).encode())

    def _open(self, name: str) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(os.path.join(self._folder, name), flags, 0o600)

    def _is_there(self) -> bool:
        """It was not removed between being opened and being locked."""
        with contextlib.suppress(FileNotFoundError):
            there = os.stat(os.path.join(self._folder, self.name))
            return os.path.samestat(there, os.fstat(self._descriptor))
        return False

    def others(self) -> Set[str]:
        """The names of the other agents that run; the records of those that do not are removed."""
        living = set()
        for name in os.listdir(self._folder):
            if name == self.name or not name[:1].isdigit():
                continue
            with contextlib.suppress(FileNotFoundError):
                descriptor = self._open_there(name)
                try:
                    if _lock(descriptor):
                        os.unlink(os.path.join(self._folder, name))
                    else:
                        living.add(name)
                finally:
                    os.close(descriptor)
        return living

    def _open_there(self, name: str) -> int:
        return os.open(os.path.join(self._folder, name), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(self._folder, self.name))
        os.close(self._descriptor)


def _span_of_environment(name: str, default: float) -> float:
    """Seconds of one of the original's variables, like 02:00:00."""
    text = os.environ.get(name)
    try:
        return (text and Span().read(text, [])) or default
    except ValueError:
        logger.warning('%s is %s: a time span like 02:00:00 expected', name, printable(text))
        return default


class AgentServices:
    """What one agent offers from its home directory, over whichever connections. Any thread may
    call.

    Workspaces are made and relative paths lead there; `environment` gives a script's environment at
    its start; with `files_root` no file outside that folder is uploaded or downloaded. `verb` and
    `arguments` are for the agent's record, `descriptors` is the soft limit that scripts get.
    """

    def __init__(
        self,
        home: str,
        environment: Callable[[], Dict[str, str]] = lambda: dict(os.environ),
        files_root: Optional[str] = None,
        limits: Limits = LIMITS,
        verb: str = 'import tentacle',
        arguments: str = '',
        descriptors: Optional[int] = None,
    ):
        self.spool = os.path.join(home, 'Work')
        self.descriptors = descriptors
        self._launcher = Launcher(descriptors, limits)
        self._home, self._verb, self._arguments = home, verb, arguments
        self.record: Optional[AgentRecord] = None
        self.scripts = Scripts(
            home,
            environment,
            self._launcher,
            limits,
            lambda: self.record.name if self.record else '',
            lambda: self.record.others() if self.record else (),
        )
        self._clean_every = _span_of_environment('TENTACLE_WORKSPACE_CLEANER_DELAY', 7200.0)
        self._clean_after = _span_of_environment(
            'TENTACLE_WORKSPACE_CLEANER_DELETE_OLDER_THAN', 86400.0
        )
        self._stopped = threading.Event()
        self._cleaner: Optional[threading.Thread] = None
        self._journal = UploadJournal(os.path.join(home, '.uploads'))
        services: Dict[str, Any] = {
            'IScriptService': ScriptService(self.scripts, limits),
            'IFileTransferService': FileTransferService(home, self._journal, files_root, limits),
            'IScriptServiceV2': ScriptServiceV2(self.scripts, limits),
        }
        services['ICapabilitiesServiceV2'] = CapabilitiesService(list(services))
        self.handle = ServiceRegistry(services).handle

    def start(self) -> None:
        """Be one of the home's agents, and look after what others left. Raises TentacleError,
        OSError.
        """
        self.record = AgentRecord(self._home, self._verb, self._arguments)
        self.record.others()  # removes the records of those that are gone
        self._journal.clean()
        self._stopped.clear()
        self._cleaner = start_thread('cleaner', self._clean)

    def _clean(self) -> None:
        while True:
            self.scripts.clean(self._clean_after)
            if self._stopped.wait(self._clean_every):
                return

    def stop(self) -> None:
        """Scripts that run go on, whether or not there is another agent."""
        self._stopped.set()
        if self._cleaner is not None:
            self._cleaner.join(LIMITS.stop)
        self._launcher.close()
        if self.record is not None:
            self.record.close()
            self.record = None


# ---- 15. Listening -------------------------------------------------------------------------------

_WELCOME_PAGE = '''<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>Tentacle</title></head>
<body>
<h1>{heading}</h1>
<p>tentacle.py {version}. {who} can talk to it once each knows the other's thumbprint. Ours is</p>
<p><code>{thumbprint}</code></p>
</body>
</html>
'''


def welcome_answer(identity: Identity, is_polled: bool) -> bytes:
    """The HTTP answer to a browser, a load balancer or a discovery call."""
    page = _WELCOME_PAGE.format(
        version=__version__,
        thumbprint=identity.thumbprint,
        heading='Tentacles poll here' if is_polled else 'A Tentacle listens here',
        who='A polling Tentacle'
        if is_polled
        else 'An Octopus Server, or tentacle.py as a dispatcher,',
    ).encode()
    return (
        'HTTP/1.0 200 OK\r\nContent-Type: text/html; charset=utf-8\r\nContent-Length: %d\r\n\r\n'
        % len(page)
    ).encode() + page


class SecureListener(socketserver.TCPServer):
    """Accepts TLS connections on IPv4 and IPv6, and gives those of pinned peers that say MX to
    `serve`, which closes them, then or later.

    Who is not pinned costs one thread until its handshake fails or its time is over, and when too
    many of these strangers wait, the oldest goes: a pinned peer always gets through. `port` is the
    real one.
    """

    allow_reuse_address = True
    request_queue_size = 512

    def __init__(
        self,
        host: str,
        port: int,
        acceptor: PinningAcceptor,
        identity: Identity,
        serve: Callable[[SecureStream], None],
        trust_command: str,
        limits: Limits = LIMITS,
        is_polled: bool = False,
    ):
        self._acceptor = acceptor
        self._page = welcome_answer(identity, is_polled)
        self._serve = serve
        self._trust_command = trust_command
        self._limits = limits
        self._max_connections, self._max_strangers = self._bounds(limits)
        self._lock = threading.Lock()
        self._none_left = threading.Condition(self._lock)
        self._strangers: 'OrderedDict[socket.socket, str]' = (
            OrderedDict()
        )  # not yet identified, oldest first
        self._peers: Dict[socket.socket, SecureStream] = {}
        self._stopping = False
        self.address_family = socket.AF_INET6 if not host or ':' in host else socket.AF_INET
        self._wake_ends = socket.socketpair()
        self._bind(host, port)

    @staticmethod
    def _bounds(limits: Limits) -> Tuple[int, int]:
        """(pinned connections, strangers) at once, so that file descriptors are left for scripts
        and files.
        """
        import resource

        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if descriptors == resource.RLIM_INFINITY:
            return limits.connections, limits.strangers
        return min(limits.connections, descriptors * 3 // 8), min(
            limits.strangers, descriptors * 3 // 8
        )

    def _bind(self, host: str, port: int) -> None:
        try:
            try:
                super().__init__((host or '::', port), socketserver.BaseRequestHandler)
            except OSError as error:
                if host or error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                    raise
                self.address_family = socket.AF_INET  # a host without IPv6
                super().__init__(('0.0.0.0', port), socketserver.BaseRequestHandler)
        except (OSError, OverflowError) as error:
            if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                raise TentacleError(
                    'Port %d is in use: another tentacle, or another program, listens there '
                    'already. Stop it, or choose another port with --port' % port
                )
            raise TentacleError(
                'Can not listen on %s port %d: %s'
                % (host or 'any address', port, getattr(error, 'strerror', error))
            )

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    @property
    def port(self) -> int:
        return self.server_address[1]

    @property
    def address(self) -> str:
        """Where it listens, as `[::]:10933`."""
        return _host_and_port(self.server_address)

    def serve_forever(self, poll_interval: Optional[float] = None) -> None:
        """Accept until `stop`, asleep while nothing comes (the inherited one wakes up often)."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.socket, selectors.EVENT_READ)
            selector.register(self._wake_ends[0], selectors.EVENT_READ)
            while not self._stopping:
                ready = [key.fileobj for key, _ in selector.select()]
                if self.socket in ready and not self._stopping:
                    self._handle_request_noblock()

    def get_request(self) -> Tuple[Any, Any]:
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                # The connection stays in the queue, so this would spin: make room, or wait until
                # there is some.
                logger.error('A connection can not be accepted: %s', error.strerror)
                if not self._make_room():
                    time.sleep(0.1)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Take a connection over into its own thread; no I/O here, so none delays the next."""
        peer = _host_and_port(client_address)
        sock = self._acceptor.wrap(request)
        with self._lock:
            self._strangers[sock] = peer
            crowded = len(self._strangers) > self._max_strangers
        if crowded:
            self._drop_oldest_stranger()
        if not self._has_spare_descriptors():
            self._make_room()
        try:
            start_connection_thread('connection ' + peer, self._connection, sock, peer)
        except BaseException:
            self._ended(sock)
            raise

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.info(
            '%s: the connection could not be taken over: %s',
            _host_and_port(client_address),
            printable(sys.exc_info()[1]),
        )

    def _drop_oldest_stranger(self) -> bool:
        with self._lock:
            if not self._strangers:
                return False
            sock, peer = self._strangers.popitem(last=False)
            _hang_up(sock)
        logger.info(
            '%s: dropped in its handshake, since %d newer connections wait in theirs',
            peer,
            self._max_strangers,
        )
        return True

    _SPARE_DESCRIPTORS = 6  # what a handshake and a call need for a moment

    def _has_spare_descriptors(self) -> bool:
        taken: List[int] = []
        try:
            for _ in range(self._SPARE_DESCRIPTORS):
                taken.append(os.dup(self.fileno()))
            return True
        except OSError:
            return False
        finally:
            for descriptor in taken:
                os.close(descriptor)

    def _make_room(self) -> bool:
        return self._drop_idle_peer() or self._drop_oldest_stranger()

    def _drop_idle_peer(self) -> bool:
        """End the connection that has been without a call for longest: its owner dials anew."""
        with self._lock:
            idle = {sock: stream for sock, stream in self._peers.items() if stream.idle_since}
            if idle:
                sock = min(idle, key=lambda sock: idle[sock].idle_since)
                idle[sock].idle_since = 0.0
                _hang_up(sock)
            return bool(idle)

    # -- the thread of a connection

    def _connection(self, sock: ssl.SSLSocket, peer: str) -> None:
        with self.reporting(peer):
            stream = self._meet(sock, peer)
            if stream is not None and self._welcome(sock, stream):
                if not self._acceptor.trusts(stream):
                    raise UntrustedThumbprint('it is trusted no more', stream.thumbprint)
                logger.info('%s: connected, thumbprint %s', peer, stream.thumbprint)
                caller.peer, caller.thumbprint = peer, stream.thumbprint
                audit('connection-accepted')
                stream.on_close = lambda: self._ended(sock)
                self._serve(stream)
                return
        self._ended(sock)

    def _ended(self, sock: socket.socket) -> None:
        with self._lock:
            self._strangers.pop(sock, None)
            self._peers.pop(sock, None)
            sock.close()
            self._none_left.notify_all()

    @contextlib.contextmanager
    def reporting(self, peer: str) -> Iterator[None]:
        """Whatever ends a connection within is told of here, and ends nothing else."""
        try:
            yield
        except UntrustedThumbprint as error:
            logger.warning(
                '%s: refused, %s. To trust it: %s %s',
                peer,
                error,
                self._trust_command,
                error.thumbprint or 'THUMBPRINT',
            )
            audit('connection-refused', peer=peer, thumbprint=error.thumbprint, reason=str(error))
        except ConnectionLost as error:
            wire_logger.info(
                '%s', error if str(error).startswith(peer) else '%s: %s' % (peer, error)
            )
        except ProtocolError as error:
            logger.warning('%s: closed, it does not keep to the protocol: %s', peer, error)
            audit('connection-refused', peer=peer, reason=printable(error))
        except (OSError, MemoryError) as error:  # the system has too little of something
            logger.error('%s: closed: %s', peer, str(error) or 'there is not enough memory')
        except Exception:  # a bug; this connection ends, the listener lives
            logger.exception('%s: closed by a bug', peer)

    def _meet(self, sock: ssl.SSLSocket, peer: str) -> Optional[SecureStream]:
        """Handshake and greeting, all within the time for it; the stream of a pinned peer that said
        MX.
        """
        deadline = time.monotonic() + self._limits.handshake
        _keep_alive(sock)
        stream = self._acceptor.handshake(sock, peer, self._limits.handshake)
        stream.set_deadline(deadline)
        greeting = stream.read_until(end_of_greeting, self._limits.greeting)
        if greeting is None:
            wire_logger.info('%s: left without a word', peer)
            return None
        if not greeting.startswith(b'MX'):
            wire_logger.info('%s: asks for the welcome page', peer)
            stream.write(self._page)
            stream.close()
            return None
        if stream.certificate is None:
            raise UntrustedThumbprint('it shows no certificate')
        stream.set_timeout(self._limits.handshake)
        return stream

    def _welcome(self, sock: ssl.SSLSocket, stream: SecureStream) -> bool:
        """Count a stranger among the pinned peers, if there is room."""
        with self._lock:
            if self._strangers.pop(sock, None) is None or self._stopping:
                return False  # dropped at the last moment
            has_room = len(self._peers) < self._max_connections
        if has_room or self._drop_idle_peer():
            with self._lock:
                self._peers[sock] = stream
            return True
        logger.warning(
            '%s: closed, %d connections of trusted peers are open already',
            stream.peer,
            self._max_connections,
        )
        audit('connection-refused', peer=stream.peer, reason='too many connections')
        return False

    def drop_untrusted(self, trusted: Container[str]) -> None:
        """End the connections of those who are pinned no more. Any thread may call."""
        with self._lock:
            for sock, stream in self._peers.items():
                if not is_pinned(stream.certificate, trusted):
                    logger.warning('%s: closed, it is trusted no more', stream.peer)
                    _hang_up(sock)

    def stop(self) -> None:
        """Let `serve_forever` return. Any thread may call."""
        self._stopping = True
        self._wake_ends[1].send(b'x')

    def server_close(self) -> None:
        """Close the port and all connections, and wait for their threads; after `serve_forever` has
        returned.
        """
        super().server_close()
        with self._lock:
            for sock in list(self._strangers) + list(self._peers):
                _hang_up(sock)
            self._none_left.wait_for(
                lambda: not self._strangers and not self._peers, self._limits.stop
            )
        for end in self._wake_ends:
            end.close()


def _services_of(services: Union[str, AgentServices], limits: Limits) -> Tuple[AgentServices, bool]:
    """(services, whether they are ours to start and stop) of an agent to embed."""
    if isinstance(services, AgentServices):
        return services, False
    return AgentServices(services, limits=limits), True


class ListeningTentacle:
    """A listening tentacle to embed: it accepts from `start` to `stop`, in threads of its own.

    `services` are those of a home directory, by its path; or AgentServices that its caller starts
    and stops, so that several share them. `trusted` gives the pinned thumbprints, and is asked for
    every connection. It runs scripts as this process's user.

        identity = tentacle.create_identity('/tmp/agent/tentacle.pem')
        trusted = frozenset(['6D7A63503024C1F8CBD8B6EDCAFCD6C84726EFB3'])
        agent = tentacle.ListeningTentacle('/tmp/agent', identity, lambda: trusted, port=0)
        agent.start()
        print(agent.port, identity.thumbprint)
        agent.stop()
    """

    def __init__(
        self,
        services: Union[str, AgentServices],
        identity: Identity,
        trusted: Callable[[], FrozenSet[str]],
        host: str = '',
        port: int = LISTENING_PORT,
        trust_command: str = 'tentacle.py configure --trust',
        limits: Limits = LIMITS,
        on_failure: Callable[[], None] = lambda: None,
    ):
        """`on_failure` is called, in a thread of ours, when it accepts no more without `stop`."""
        self._limits = limits
        self._on_failure = on_failure
        self._trusted = trusted
        self._services, self._owns_services = _services_of(services, limits)
        self._listener = SecureListener(
            host,
            port,
            PinningAcceptor(identity, trusted),
            identity,
            self._serve,
            trust_command,
            limits,
        )
        self._thread: Optional[threading.Thread] = None

    @property
    def port(self) -> int:
        return self._listener.port

    @property
    def address(self) -> str:
        return self._listener.address

    def _serve(self, stream: SecureStream) -> None:
        exchange = MessageExchange(stream, self._services.spool, self._limits)
        try:
            exchange.as_server(self._services.handle)
        finally:
            exchange.close()

    def drop_untrusted(self) -> None:
        """End the connections of those who are pinned no more. Any thread may call."""
        self._listener.drop_untrusted(self._trusted())

    def start(self) -> None:
        """Take over what an agent before us left, and accept from now on."""
        threading.stack_size(self._limits.thread_stack)
        if self._owns_services:
            self._services.start()
        self._thread = start_thread('listener', self._listen)

    def _listen(self) -> None:
        try:
            self._listener.serve_forever()
        except BaseException:
            logger.exception('No connection is accepted any more')
            self._on_failure()

    def stop(self) -> None:
        """Close the port and every connection. Scripts that run go on, for the next agent."""
        self._listener.stop()
        if self._thread is not None:
            self._thread.join()
        self._listener.server_close()
        if self._owns_services:
            self._services.stop()


# ---- 16. Polling ---------------------------------------------------------------------------------


class BackOff:
    """How long a polling tentacle waits before it dials again (wire notes 2): as long as it has
    been failing, and up to as long again at random.
    """

    def __init__(self, limits: Limits = LIMITS, chance: Callable[[], float] = random.random):
        self._limits = limits
        self._chance = chance
        self._failing_since: Optional[float] = None

    def succeeded(self) -> None:
        self._failing_since = None

    def failed(self, now: float) -> float:
        """Seconds to wait, after a failure at a moment of `time.monotonic`."""
        if self._failing_since is None:
            self._failing_since = now
        delay = (now - self._failing_since) * (1 + self._chance())
        return min(max(delay, self._limits.least_back_off), self._limits.most_back_off)


class PollingTentacle:
    """A polling tentacle to embed: it dials its servers and does their work, from `start` to
    `stop`, in threads of its own; or `run_once`, for as long as there is work.

    `services` are as for a ListeningTentacle. `servers` are URLs, each of which gets so many
    `connections`; `trusted` gives the thumbprints that they may show. `proxy_of` gives the proxy to
    a server's URL, or None.

        identity = tentacle.create_identity('/tmp/agent/tentacle.pem')
        trusted = frozenset(['6D7A63503024C1F8CBD8B6EDCAFCD6C84726EFB3'])
        agent = tentacle.PollingTentacle(
            '/tmp/agent', identity, lambda: trusted, ['https://localhost:10943/'], 'poll://one/')
        agent.start()
        agent.stop()
    """

    def __init__(
        self,
        services: Union[str, AgentServices],
        identity: Identity,
        trusted: Callable[[], FrozenSet[str]],
        servers: Sequence[str],
        subscription: str,
        connections: int = 1,
        proxy_of: Callable[[str], Optional[Proxy]] = lambda uri: None,
        trust_command: str = 'tentacle.py configure --trust',
        limits: Limits = LIMITS,
    ):
        self._services, self._owns_services = _services_of(services, limits)
        self._identity = identity
        self._trusted = trusted
        #: URLs, each as often as it has connections
        self.servers = [parse_target_uri(url, POLLING_PORT) for url in servers] * connections
        self.subscription = parse_subscription(subscription)
        self._proxy_of = proxy_of
        self._trust_command = trust_command
        self._limits = limits
        self._changed = threading.Condition()
        self._impulses = 0  # to dial at once
        self._stopping = False
        self._streams: List[SecureStream] = []
        self._threads: List[threading.Thread] = []
        self._deadline = float('inf')
        self._reached = False

    def start(self) -> None:
        """Take over what an agent before us left, and poll from now on."""
        threading.stack_size(self._limits.thread_stack)
        if self._owns_services:
            self._services.start()
        self._start_threads(self._keep_polling)

    def _start_threads(self, target: Callable[[str], None]) -> None:
        self._threads = [
            start_thread('polling ' + uri[len('https://') : -1], target, uri)
            for uri in self.servers
        ]

    def stop(self) -> None:
        """End every connection. Scripts that run go on, for the next agent."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            for stream in self._streams:
                stream.hang_up()
        deadline = time.monotonic() + self._limits.stop
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))
        if self._owns_services:
            self._services.stop()

    def drop_untrusted(self) -> None:
        """End the connections to servers that are pinned no more. Any thread may call."""
        trusted = self._trusted()
        with self._changed:
            for stream in self._streams:
                if not is_pinned(stream.certificate, trusted):
                    logger.warning('%s: closed, it is trusted no more', stream.peer)
                    stream.hang_up()

    def dial_now(self) -> None:
        """End all waiting for the next dial: the network may have changed."""
        with self._changed:
            self._impulses += 1
            self._changed.notify_all()

    def run_once(self, max_time: float = float('inf')) -> bool:
        """Do all the work there is, follow the scripts until they are completed, and end, after
        `max_time` seconds, or with the call that is under way then. Whether any server was reached.
        """
        threading.stack_size(self._limits.thread_stack)
        self._deadline = time.monotonic() + max_time
        if self._owns_services:
            self._services.start()
        try:
            self._start_threads(self._poll_while_there_is_work)
            for thread in self._threads:
                thread.join()
        finally:
            self.stop()
        return self._reached

    # -- a connection's thread

    def _keep_polling(self, uri: str) -> None:
        back_off = BackOff(self._limits)
        while not self._stopping:
            self._poll(uri, back_off)
            self._pause(back_off.failed(time.monotonic()))

    def _poll_while_there_is_work(self, uri: str) -> None:
        back_off = BackOff(self._limits)
        while not self._poll(uri, back_off, self._goes_on):
            left = self._deadline - time.monotonic()
            if self._stopping or left <= 0 or not (self._reached and self._has_work()):
                return
            self._pause(min(back_off.failed(time.monotonic()), left))

    def _has_work(self) -> bool:
        return self._services.scripts.has_work()

    def _goes_on(self, idle: bool) -> bool:
        if time.monotonic() >= self._deadline:
            return False
        return not idle or self._has_work()

    def _time_left(self) -> float:
        return max(self._deadline - time.monotonic(), 0.01)

    def _patience(self) -> float:
        return min(self._limits.request, self._time_left())

    def _pause(self, seconds: float) -> None:
        with self._changed:
            impulses = self._impulses
            self._changed.wait_for(lambda: self._stopping or self._impulses != impulses, seconds)

    def _poll(
        self,
        uri: str,
        back_off: BackOff,
        goes_on: Callable[[bool], bool] = lambda idle: True,
    ) -> bool:
        """One connection from dial to end; whether it was we who left. Never raises."""

        is_identified = False

        def identified() -> None:
            nonlocal is_identified
            is_identified = True
            back_off.succeeded()
            self._reached = True
            logger.info('%s: connected, polling for %s', stream.peer, self.subscription)

        left = self._time_left()
        limits = self._limits._replace(
            connect=min(self._limits.connect, left), handshake=min(self._limits.handshake, left)
        )
        try:
            endpoint = ServiceEndPoint(uri, None, self._proxy_of(uri))
            stream = connect(endpoint, self._identity, limits, self._trusted())
            caller.peer, caller.thumbprint = stream.peer, stream.thumbprint
            with self._registered(stream):
                audit('connection-accepted', subscription=self.subscription)
                MessageExchange(stream, self._services.spool, self._limits).as_subscriber(
                    self.subscription, self._services.handle, identified, self._patience, goes_on
                )
            return True
        except TentacleError as error:
            hint = ''
            if getattr(error, 'thumbprint', None):
                hint = '. To trust it: %s %s' % (self._trust_command, error.thumbprint)
            elif not (is_identified or isinstance(error, NotDelivered)):
                hint = '. Does it trust us? On the server: tentacle.py trust %s %s' % (
                    self.subscription,
                    self._identity.thumbprint,
                )
            if isinstance(error, UntrustedThumbprint):
                facts = {'thumbprint': error.thumbprint, 'reason': str(error)}
                audit('connection-refused', peer=uri, **facts)
            if not self._stopping and time.monotonic() < self._deadline:
                logger.warning('%s%s', error, hint)
        except Exception:  # a bug; this connection ends, the next is dialled
            logger.exception('%s: ended by a bug', uri)
        return False

    @contextlib.contextmanager
    def _registered(self, stream: SecureStream) -> Iterator[None]:
        with self._changed:
            self._streams.append(stream)
            if self._stopping or not is_pinned(stream.certificate, self._trusted()):
                stream.hang_up()
        try:
            yield
        finally:
            with self._changed:
                self._streams.remove(stream)
                stream.close()


# ---- 17. Dispatcher ------------------------------------------------------------------------------


class OutputLine(NamedTuple):
    """A line of a script's log, as the dispatcher hands it on."""

    source: int  # 0 stdout, 1 stderr, 2 the agent's own notes
    occurred: int  # milliseconds since 1970, by the agent's clock
    text: str
    remark: bool  # the agent's own, not the script's


class ScriptResult(NamedTuple):
    exit_code: int
    lines: List[OutputLine]

    @property
    def stdout(self) -> str:
        """What the script wrote to stdout."""
        return ''.join(
            line.text + '\n' for line in self.lines if line.source == STDOUT and not line.remark
        )

    @property
    def stderr(self) -> str:
        return ''.join(
            line.text + '\n' for line in self.lines if line.source == STDERR and not line.remark
        )


class RemarkFilter:
    """Tells an agent's own remarks from a script's output.

    Debug lines are remarks, and what stands between `##octopus[stdout-verbose]` (or -wait, -warning
    ...) and `##octopus[stdout-default]`, these markers included.
    """

    _MARKER = '##octopus[stdout-'

    def __init__(self) -> None:
        self._remarks = False

    def line(self, entry: LogEntry) -> OutputLine:
        source, occurred, text = entry
        remark = source == DEBUG
        if source == STDOUT:
            if text.startswith(self._MARKER) and text.endswith(']'):
                self._remarks = text != self._MARKER + 'default]'
                remark = True
            else:
                remark = self._remarks
        return OutputLine(source, occurred, text, remark)


class Transferred(NamedTuple):
    """What became of a file's transfer."""

    path: str  # its full path on the tentacle
    length: int  # bytes
    sha1: str  # lower-case hex


class _MeasuredSource(io.RawIOBase):
    """A file on its way out: its hash and its progress are taken as it is read."""

    def __init__(self, file: BinaryIO, on_progress: Callable[[int], None]):
        self._file: Any = file
        self._on_progress = on_progress
        self._done = 0
        self.digest = sha1()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        self.digest.update(memoryview(buffer)[:count])
        self._done += count
        self._on_progress(self._done)
        return count


class _ScriptCallsV2:
    """One script by the calls of `IScriptServiceV2` of a TentacleClient."""

    may_start_again = True  # the ticket is ours: a second start is the same script

    def __init__(self, client: Any, ticket: Optional[str] = None):
        self._client = client
        self._ticket = ScriptTicket(task_id=ticket or new_ticket())

    @property
    def ticket(self) -> str:
        return (self._ticket and self._ticket.task_id) or ''

    def _call(self, method: str, command: Contract) -> ScriptStatusResponseV2:
        return self._client.call_for(ScriptStatusResponseV2, 'IScriptServiceV2', method, command)

    def start(self, body: str, task_id: str, files: List[ScriptFile], wait: float) -> Any:
        """The first status."""
        return self._call(
            'StartScript',
            StartScriptCommandV2(
                ticket=self._ticket,
                script_body=body,
                task_id=task_id,
                duration_to_wait=wait,
                mutex_timeout=NO_MUTEX_TIMEOUT,
                mutex_name=DEFAULT_MUTEX,
                files=files,
            ),
        )

    def status(self, after: int) -> Any:
        return self._call(
            'GetStatus', ScriptStatusRequestV2(ticket=self._ticket, last_log_sequence=after)
        )

    def cancel(self, after: int) -> Any:
        return self._call(
            'CancelScript', CancelScriptCommandV2(ticket=self._ticket, last_log_sequence=after)
        )

    def complete(self, after: int) -> None:
        self._client.call(
            'IScriptServiceV2', 'CompleteScript', CompleteScriptCommandV2(ticket=self._ticket)
        )


class _ScriptCallsV1:
    """The same by `IScriptService`, where the tentacle names the ticket."""

    may_start_again = False

    def __init__(self, client: Any, ticket: Optional[str] = None):
        self._client = client
        self._ticket = ScriptTicket(task_id=ticket) if ticket else None

    @property
    def ticket(self) -> str:
        return (self._ticket and self._ticket.task_id) or ''

    def _call(self, method: str, command: Contract) -> ScriptStatusResponse:
        return self._client.call_for(ScriptStatusResponse, 'IScriptService', method, command)

    def start(self, body: str, task_id: str, files: List[ScriptFile], wait: float) -> Any:
        """The first status. When its answer is lost nobody knows the ticket."""
        self._ticket = self._client.call_for(
            ScriptTicket,
            'IScriptService',
            'StartScript',
            StartScriptCommand(
                script_body=body,
                task_id=task_id,
                mutex_timeout=NO_MUTEX_TIMEOUT,
                mutex_name=DEFAULT_MUTEX,
                files=files,
            ),
        )
        return self.status(0)

    def status(self, after: int) -> Any:
        return self._call(
            'GetStatus', ScriptStatusRequest(ticket=self._ticket, last_log_sequence=after)
        )

    def cancel(self, after: int) -> Any:
        return self._call(
            'CancelScript', CancelScriptCommand(ticket=self._ticket, last_log_sequence=after)
        )

    def complete(self, after: int) -> None:
        self._call(
            'CompleteScript', CompleteScriptCommand(ticket=self._ticket, last_log_sequence=after)
        )


class _ScriptRun:
    """Follows one script from start to completion, handing on each line once."""

    _START_WAIT = 0.3  # a short script is done within the start; a longer one shows its output soon
    _PAUSES = (
        0.05,
        0.1,
        0.2,
        0.4,
    )  # between questions while nothing comes; back to the first when something does

    _MANY_LINES = 1000  # in one answer: there are more, so the next question follows at once

    def __init__(
        self,
        calls: Any,
        on_line: Callable[[OutputLine], None],
        limits: Limits,
        stop: threading.Event,
    ):
        self._calls = calls
        self._on_line = on_line
        self._limits = limits
        self._stop = stop  # our caller's wish to have it cancelled
        self._remarks = RemarkFilter()
        self._next = 0
        self._state: Optional[int] = None  # None: not known to have been started
        self._exit_code = 0

    def run(self, body: str, task_id: str, files: List[ScriptFile]) -> int:
        try:
            self._take(self._start(body, task_id, files))
            self._follow(lambda: self._ask(self._calls.status), float('inf'))
        except BaseException as error:
            if not isinstance(error, KeyboardInterrupt):
                self._on_line = lambda line: None  # it may be what failed
            if self._state is not None or not isinstance(error, TentacleError):
                self._stop = threading.Event()  # it is fulfilled
                self._cancel()
            raise
        self._complete()
        return self._exit_code

    def _start(self, body: str, task_id: str, files: List[ScriptFile]) -> Any:
        """The first status. A start whose answer was lost is sent again where its ticket says that
        it is the same one.
        """
        send = lambda after: self._calls.start(body, task_id, files, self._START_WAIT)
        try:
            return send(0)
        except NotDelivered:
            raise
        except ConnectionLost as error:
            if not self._calls.may_start_again:
                raise ConnectionLost('%s. Whether the script was started is not known' % error)
            logger.info('%s; sending the start again, with the same ticket', error)
            return self._ask(send)

    def _take(self, status: Any) -> int:
        """Hand on the lines that are new; how many there were."""
        if status.exit_code == UNKNOWN_TICKET_EXIT_CODE and status.state == COMPLETE:
            raise TentacleError('The tentacle does not know the script: its outcome is not known')
        count = 0
        for entry in status.logs:
            self._on_line(self._remarks.line(entry))
            count += 1
        self._next = max(self._next, status.next_log_sequence)
        self._state, self._exit_code = status.state, status.exit_code
        return count

    def _ask(self, call: Callable[[int], Any]) -> Any:
        """Ask for the status; again on a new connection where one broke, since asking changes
        nothing.
        """
        for attempt in range(self._limits.reconnect_attempts):
            try:
                return call(self._next)
            except ConnectionLost as error:
                if attempt == self._limits.reconnect_attempts - 1:
                    raise ConnectionLost(str(error))  # it is the script's end that is not known
                logger.info('%s; asking again', error)
                self._pause(self._limits.reconnect_pause)

    def _pause(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise Cancelled('The script was cancelled')

    def _follow(self, ask: Callable[[], Any], deadline: float) -> None:
        quiet = new = 0
        while self._state != COMPLETE and time.monotonic() < deadline:
            if new < self._MANY_LINES:
                self._pause(self._PAUSES[min(quiet, len(self._PAUSES) - 1)])
            new = self._take(ask())
            quiet = 0 if new else quiet + 1

    def _cancel(self) -> None:
        """Cancel the script there and see it end; the reason for it is on its way to the caller."""
        try:
            self._follow(
                lambda: self._ask(self._calls.cancel),
                time.monotonic() + self._limits.cancelled_script,
            )
            self._complete()
        except (TentacleError, OSError) as error:
            logger.warning('The script could not be cancelled, it may go on there: %s', error)

    def _complete(self) -> None:
        try:
            self._calls.complete(self._next)
        except TentacleError as error:
            logger.info('The workspace could not be removed there, it will be by and by: %s', error)


class _Calls:
    """The services of one tentacle, whichever way `_deliver` takes the requests there."""

    def __init__(self, endpoint: ServiceEndPoint, limits: Limits):
        self.endpoint = endpoint
        self._limits = limits
        self._lock = threading.Lock()
        self._capabilities: Optional[List[str]] = None
        self._calls = 0

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def close(self) -> None:
        """End what is idle; calls in flight end by themselves."""

    def _deliver(self, request: Request, take: Optional[Callable[[Response], None]]) -> Response:
        raise NotImplementedError

    def call(
        self,
        service: str,
        method: str,
        *params: Any,
        take: Optional[Callable[[Response], None]] = None,
    ) -> Any:
        """Call a method and give its result; `take` as for `MessageExchange.call`.

        Raises ServiceError (the answer is an error), NotDelivered, ConnectionLost (it may have
        run), UntrustedThumbprint, ProtocolError.
        """
        with self._lock:
            self._calls += 1
            number = self._calls
        activity = uuid.uuid4()
        request = Request(
            '%s::%s[%d] / %s' % (service, method, number, activity),
            service,
            method,
            list(params),
            activity,
            self.endpoint,
        )
        response = self._deliver(request, take)
        if response.error is not None:
            raise response.error
        return response.result

    def call_for(self, expected: type, service: str, method: str, *params: Any) -> Any:
        """The same, where the result must be of a type. Raises ProtocolError when it is not."""
        result = self.call(service, method, *params)
        if not isinstance(result, expected):
            raise ProtocolError(
                '%s.%s must answer with a %s' % (service, method, expected.__name__)
            )
        return result

    def capabilities(self) -> List[str]:
        """The services that the tentacle says it has; an old one without this service has the first
        two.
        """
        with self._lock:
            known = self._capabilities
        if known is None:
            try:
                known = self.call_for(
                    CapabilitiesResponseV2, 'ICapabilitiesServiceV2', 'GetCapabilities'
                ).supported_capabilities
            except ServiceError as error:
                if (
                    error.error_type != SERVICE_NOT_FOUND
                    and 'has not been registered through' not in str(error)
                ):
                    raise
                known = ['IScriptService', 'IFileTransferService']
            with self._lock:
                self._capabilities = known
        return known

    # -- files

    def upload(
        self,
        file: BinaryIO,
        remote_path: str,
        on_progress: Callable[[int], None] = lambda done: None,
    ) -> Transferred:
        """Send all of a seekable file, which takes the place of `remote_path` when it is whole
        there.

        `on_progress` gets the number of bytes read, from any thread. Raises what `call` does, and
        TentacleError when the tentacle has another hash than we.
        """
        length = file.seek(0, os.SEEK_END)
        file.seek(0)
        source = _MeasuredSource(file, on_progress)
        result = self.call_for(
            UploadResult,
            'IFileTransferService',
            'UploadFile',
            remote_path,
            DataStream(length, lambda: source),  # type: ignore[arg-type,return-value]
        )
        ours = source.digest.hexdigest()
        if (result.length, (result.hash or '').lower()) != (length, ours):
            raise TentacleError(
                '%s was damaged on its way: we sent %d bytes with SHA-1 %s, the tentacle has %d '
                'with %s. Send it again'
                % (remote_path, length, ours, result.length, printable(result.hash))
            )
        return Transferred(result.full_path or remote_path, length, ours)

    def download(
        self,
        remote_path: str,
        file: BinaryIO,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Optional[Transferred]:
        """Write the tentacle's file into one of ours; None when it has none of that name.

        `on_progress` gets the number of bytes written and that of all. Raises what `call` does, and
        OSError for our file.
        """
        digest = sha1()
        received = total = 0

        def keep(part: memoryview) -> None:
            nonlocal received
            digest.update(part)
            write_soon(file, part)
            received += len(part)
            on_progress(received, total)

        def take(response: Response) -> None:
            nonlocal total
            if isinstance(response.result, DataStream):
                total = response.result.length
                pump(response.result.open(), keep, total)

        stream = self.call('IFileTransferService', 'DownloadFile', remote_path, take=take)
        if stream is None:
            return None
        if not isinstance(stream, DataStream):
            raise ProtocolError('DownloadFile must answer with a data stream')
        return Transferred(remote_path, total, digest.hexdigest())

    # -- scripts, by the newer service where it has it, else by the older

    def run_script(
        self,
        body: str,
        on_line: Callable[[OutputLine], None],
        task_id: str = 'tentacle.py',
        files: Sequence[ScriptFile] = (),
        stop: Optional[threading.Event] = None,
    ) -> int:
        """Run a script and hand on its lines as they come; its exit code. The files are put beside
        it.

        Whatever ends this early (Ctrl-C, an exception of `on_line`; `stop` that is set, for which
        Cancelled is raised) cancels the script there first.
        """
        calls: Any = (
            _ScriptCallsV2 if 'IScriptServiceV2' in self.capabilities() else _ScriptCallsV1
        )(self)
        stop = stop or threading.Event()
        return _ScriptRun(calls, on_line, self._limits, stop).run(body, task_id, list(files))


class TentacleClient(_Calls):
    """Calls the services of a listening tentacle, over warm connections where there are some. Any
    thread may call.

        identity = tentacle.create_identity('/tmp/dispatcher/tentacle.pem')
        endpoint = tentacle.ServiceEndPoint(
            'https://localhost:10933/', '6D7A63503024C1F8CBD8B6EDCAFCD6C84726EFB3')
        with tentacle.TentacleClient(endpoint, identity) as client:
            print(client.capabilities())

    A pooled connection that died is replaced unseen; a request that may have run is never sent
    again.
    """

    def __init__(self, endpoint: ServiceEndPoint, identity: Identity, limits: Limits = LIMITS):
        super().__init__(endpoint, limits)
        self._identity = identity
        self._pool: List[
            Tuple[MessageExchange, float]
        ] = []  # (idle connection, since), the latest last

    def close(self) -> None:
        """End the idle connections; calls in flight end by themselves."""
        with self._lock:
            pool, self._pool = self._pool, []
        for exchange, _ in pool:
            exchange.leave()

    def _pooled(self) -> Optional[MessageExchange]:
        """A warm connection that is ready for a request, or None."""
        while True:
            with self._lock:
                if not self._pool:
                    return None
                exchange, since = self._pool.pop()
            if time.monotonic() - since > self._limits.pooled:
                exchange.leave()
                continue
            try:
                exchange.go_on()
                return exchange
            except TentacleError as error:
                wire_logger.info('A pooled connection is replaced: %s', error)
                exchange.close()

    def _connect(self) -> SocketStream:
        return connect(self.endpoint, self._identity, self._limits)

    def _dial(self) -> MessageExchange:
        stream = self._connect()
        exchange = MessageExchange(stream, limits=self._limits)
        try:
            exchange.as_client()
        except BaseException as error:
            exchange.close()
            if isinstance(error, (ConnectionLost, UntrustedThumbprint)):
                kind = NotDelivered if isinstance(error, ConnectionLost) else UntrustedThumbprint
                raise kind(
                    '%s. Does it trust us? On it: tentacle.py configure --trust %s'
                    % (error, self._identity.thumbprint)
                )
            if isinstance(error, ProtocolError):
                raise ProtocolError(
                    '%s has the pinned certificate, but does not speak Halibut: %s'
                    % (stream.peer, error)
                )
            raise
        with self._lock:
            self._capabilities = None  # it may be another version by now
        return exchange

    def _deliver(self, request: Request, take: Optional[Callable[[Response], None]]) -> Response:
        exchange = self._pooled() or self._dial()
        try:
            response = exchange.call(request, take)
        except BaseException:
            exchange.close()  # given up: never to be used for another call
            raise
        with self._lock:
            self._pool.append((exchange, time.monotonic()))
        return response


# -- the server that polling tentacles poll


class _PendingCall:
    """A call for a polling tentacle, waiting to be fetched or under way."""

    def __init__(self, request: Request, take: Optional[Callable[[Response], None]]):
        from concurrent.futures import Future

        self.request = request
        self.thumbprint = request.endpoint and request.endpoint.thumbprint
        self.outcome: Any = Future()
        self._take = take

    def run(self, exchange: MessageExchange) -> None:
        """In the thread of the connection that fetched it."""
        try:
            response = exchange.call(self.request, self._take)
        except TentacleError as error:
            self.outcome.set_exception(error)
            raise
        except BaseException as error:  # of the caller's own: it alone shall hear of it
            self.outcome.set_exception(error)
            raise ConnectionLost('%s: its caller gave up' % exchange.stream.peer)
        self.outcome.set_result(response)


class PolledConnection(NamedTuple):
    """A connection of a polling tentacle, as `PollingServer.connections` lists it."""

    subscription: str
    thumbprint: str
    address: str
    since: float  # seconds since 1970
    last_seen: float


class _Poller:
    """A connection of a polling tentacle to our server. All but the exchange is under its lock."""

    def __init__(self, exchange: MessageExchange, stream: SecureStream):
        self.exchange = exchange
        self.stream = stream
        self.subscription: Any = None
        self.since = self.last_seen = time.time()
        self.is_asked = False  #: it has a null request, and is to say NEXT

    def fileno(self) -> int:
        """For `selectors`."""
        return self.stream.fileno()


class _Subscription:
    """The calls for one subscription, first in, first out, for any number of connections. All of it
    is under the server's lock.
    """

    def __init__(self, uri: str, lock: Any):
        self.uri = uri
        self.pollers: List[_Poller] = []
        self.lingering = 0  #: of the pollers, those whose thread waits for `queued`
        self.calls: List[_PendingCall] = []
        self.queued = threading.Condition(lock)
        self.last_seen: Optional[float] = None
        self.is_pinned = False  #: to a thumbprint

    def first_call_for(self, stream: SecureStream) -> Optional[_PendingCall]:
        """The first call that a connection may have: a pinned thumbprint must be its own."""
        for call in self.calls:
            if call.thumbprint is None or is_pinned(stream.certificate, [call.thumbprint]):
                return call
        return None


class PolledClient(_Calls):
    """Calls the services of a polling tentacle through a server in this process."""

    def __init__(self, server: Any, endpoint: ServiceEndPoint, limits: Limits = LIMITS):
        super().__init__(endpoint, limits)
        self._server = server

    def _deliver(self, request: Request, take: Optional[Callable[[Response], None]]) -> Response:
        return self._server.call(request, take)


class PollingServer:
    """Lets polling tentacles come here and calls them: from `start` to `stop`, in threads of its
    own. Any thread may call.

    A connection has a thread while it has calls, and a moment longer. Then it is idle: one thread
    for all waits for them to leave, and sends them their null requests.

    `trusted` gives the thumbprints that may poll, and `pinned` the one that a subscription must
    show, or None when it may be any of them.

        identity = tentacle.create_identity('/tmp/server/tentacle.pem')
        trusted = frozenset(['6D7A63503024C1F8CBD8B6EDCAFCD6C84726EFB3'])
        server = tentacle.PollingServer(identity, lambda: trusted, port=0)
        server.start()
        with server.client(tentacle.ServiceEndPoint('poll://one/')) as client:
            print(server.port, client.endpoint.uri)
        server.stop()
    """

    def __init__(
        self,
        identity: Identity,
        trusted: Callable[[], FrozenSet[str]],
        host: str = '',
        port: int = POLLING_PORT,
        pinned: Callable[[str], Optional[str]] = lambda subscription: None,
        trust_command: str = 'tentacle.py serve --trust',
        limits: Limits = LIMITS,
    ):
        self.on_admitted: Callable[[str], None] = lambda uri: None  #: a tentacle polls, for this
        self._pinned = pinned
        self._limits = limits
        self._lock = threading.Lock()
        self._closed = False
        self._subscriptions: Dict[str, _Subscription] = {}
        self._idle: 'OrderedDict[_Poller, float]' = OrderedDict()  # to when its null request is due
        self._selector = selectors.DefaultSelector()  # of the idle ones
        self._wake_ends = socket.socketpair()
        self._selector.register(self._wake_ends[0], selectors.EVENT_READ)
        self._listener = SecureListener(
            host,
            port,
            PinningAcceptor(identity, trusted),
            identity,
            self._serve,
            trust_command,
            limits._replace(connections=limits.polling_connections),
            is_polled=True,
        )
        self._threads: List[threading.Thread] = []

    @property
    def port(self) -> int:
        return self._listener.port

    @property
    def address(self) -> str:
        return self._listener.address

    def start(self) -> None:
        """Accept from now on."""
        threading.stack_size(self._limits.thread_stack)
        self._threads = [
            start_thread('listener', self._listener.serve_forever),
            start_thread('idle connections', self._watch),
        ]

    def stop(self) -> None:
        """Close the port and every connection; calls that nobody has fetched are withdrawn."""
        self._listener.stop()
        with self._lock:
            self._closed = True
            for subscription in self._subscriptions.values():
                for call in subscription.calls:
                    call.outcome.cancel()
                subscription.calls.clear()
                subscription.queued.notify_all()
            self._wake()
        for thread in self._threads:
            thread.join()
        for poller in list(self._idle):
            self._forget(poller)
        self._listener.server_close()
        self._selector.close()
        for end in self._wake_ends:
            end.close()

    def connections(self) -> List[PolledConnection]:
        """Who is connected, in the order of their coming."""
        with self._lock:
            listed = [
                PolledConnection(
                    subscription.uri,
                    poller.stream.thumbprint or '',
                    poller.stream.peer,
                    poller.since,
                    poller.last_seen,
                )
                for subscription in self._subscriptions.values()
                for poller in subscription.pollers
            ]
        return sorted(listed, key=lambda connection: connection.since)

    def is_connected(self, uri: str) -> bool:
        with self._lock:
            subscription = self._subscriptions.get(uri)
            return subscription is not None and bool(subscription.pollers)

    def last_seen(self, uri: str) -> Optional[float]:
        """When a pinned subscription was polled last, in seconds since 1970; None: not since we
        began.
        """
        with self._lock:
            subscription = self._subscriptions.get(uri)
            return subscription and subscription.last_seen

    def client(self, endpoint: ServiceEndPoint) -> PolledClient:
        """A client for a subscription's tentacle, connected or not."""
        return PolledClient(self, endpoint, self._limits)

    def _subscription(self, uri: str) -> _Subscription:
        """With the lock."""
        if uri not in self._subscriptions:
            self._subscriptions[uri] = _Subscription(uri, self._lock)
        return self._subscriptions[uri]

    def submit(
        self, request: Request, take: Optional[Callable[[Response], None]] = None
    ) -> Tuple[Any, Callable[[], bool]]:
        """Queue a request for the subscription of its endpoint: (future of the response, function
        that withdraws what nobody has fetched and says whether that was so).
        """
        assert request.endpoint is not None
        call = _PendingCall(request, take)
        with self._lock:
            subscription = self._subscription(parse_subscription(request.endpoint.uri))
            if self._closed:
                call.outcome.cancel()
            else:
                subscription.calls.append(call)
                self._hand_out(subscription)

        def withdraw() -> bool:
            with self._lock:
                if call in subscription.calls:
                    subscription.calls.remove(call)
                    self._tidy(subscription)
            return call.outcome.cancel()

        return call.outcome, withdraw

    def call(self, request: Request, take: Optional[Callable[[Response], None]] = None) -> Response:
        """The same, waiting for the response; no longer than the endpoint says for it to be
        fetched. Raises NotDelivered (nobody fetched it), ConnectionLost, ProtocolError.
        """
        from concurrent.futures import CancelledError
        from concurrent.futures import TimeoutError as NotYet

        outcome, withdraw = self.submit(request, take)
        try:
            return outcome.result(request.endpoint and request.endpoint.queue_timeout)
        except NotYet:
            if withdraw():
                raise self.not_fetched(request)
            return outcome.result()
        except CancelledError:
            raise NotDelivered('The server for polling tentacles was stopped')
        except BaseException:
            withdraw()
            raise

    def not_fetched(self, request: Request) -> NotDelivered:
        """The error for a call that nobody fetched in its time."""
        assert request.endpoint is not None
        uri = parse_subscription(request.endpoint.uri)
        with self._lock:
            subscription = self._subscriptions.get(uri) or _Subscription(uri, self._lock)
            known = ' or '.join({poller.stream.thumbprint or '' for poller in subscription.pollers})
        if known:
            reason = 'it is connected with thumbprint %s' % known
            if request.endpoint.thumbprint:
                reason += ', pinned is %s' % request.endpoint.thumbprint
        elif subscription.last_seen is not None:
            reason = 'it was last seen %.0f s ago' % (time.time() - subscription.last_seen)
        else:
            reason = (
                'it has not polled since this server was started: `tentacle.py targets` shows who '
                'does'
            )
        return NotDelivered(
            '%s did not fetch the call within %g s: %s'
            % (subscription.uri, request.endpoint.queue_timeout, reason)
        )

    def _hand_out(self, subscription: _Subscription) -> None:
        """Let a connection look for the calls of its subscription. With the lock."""
        if subscription.calls and subscription.lingering:
            subscription.queued.notify()
        elif subscription.calls:
            able = [
                poller
                for poller in subscription.pollers
                if poller in self._idle and subscription.first_call_for(poller.stream)
            ]
            if able:  # one that answered last is the least likely to be dead
                self._give_thread(max(able, key=lambda one: (not one.is_asked, one.last_seen)))

    def _tidy(self, subscription: _Subscription) -> None:
        """Forget a subscription that is not in use, or a peer's fancy could fill the memory. With
        the lock.
        """
        if not (subscription.is_pinned or subscription.pollers or subscription.calls):
            self._subscriptions.pop(subscription.uri, None)

    # -- the thread of a connection that is not idle

    def _serve(self, stream: SecureStream) -> None:
        exchange = MessageExchange(stream, limits=self._limits)
        poller = _Poller(exchange, stream)

        def subscribe(uri: str) -> None:
            try:
                self._admit(poller, parse_subscription(uri))
            except UsageError as error:
                raise ProtocolError(str(error))

        try:
            exchange.accept_subscriber(subscribe)
            self.on_admitted(poller.subscription.uri)
        except BaseException:
            self._forget(poller)
            raise
        self._poll(poller)

    def _poll(self, poller: _Poller) -> None:
        """Have a connection fetch the calls that there are, until it is idle, or has left."""
        is_idle = False
        with self._listener.reporting(poller.stream.peer):
            patience = 0.0
            poller.stream.set_timeout(self._limits.progress)
            while not poller.is_asked or poller.exchange.asks_for_more():
                call = self._fetch(poller, patience)
                is_idle = call is None
                if call is None:
                    break
                poller.stream.set_timeout(self._limits.progress)
                poller.is_asked = True
                call.run(poller.exchange)
                patience = self._limits.linger
        if not is_idle:
            self._forget(poller)

    def _fetch(self, poller: _Poller, patience: float) -> Optional[_PendingCall]:
        """The next call for a connection; None when there is none for so many seconds, and then it
        is idle.

        Raises ConnectionLost when the tentacle has left meanwhile, which then loses no call.
        """
        subscription = poller.subscription
        deadline = time.monotonic() + patience
        with self._lock:
            poller.is_asked = False
            poller.last_seen = subscription.last_seen = time.time()
            while not self._closed:
                call = subscription.first_call_for(poller.stream)
                left = deadline - time.monotonic()
                if call is None and left <= 0:
                    self._make_idle(poller)
                    return None
                if call is None:
                    subscription.lingering += 1
                    subscription.queued.wait(left)
                    subscription.lingering -= 1
                    continue
                if poller.stream.has_more():
                    raise ConnectionLost('%s has closed the connection' % poller.stream.peer)
                subscription.calls.remove(call)
                self._hand_out(subscription)
                if call.outcome.set_running_or_notify_cancel():
                    return call
        raise ConnectionLost('the server for polling tentacles was stopped')

    def _forget(self, poller: _Poller) -> None:
        """The end of a connection; the calls that it has not fetched are for others."""
        poller.exchange.close()
        with self._lock:
            subscription = poller.subscription
            if subscription is not None:
                logger.info('%s: %s has left', poller.stream.peer, subscription.uri)
                subscription.pollers.remove(poller)
                self._hand_out(subscription)
                self._tidy(subscription)

    def _admit(self, poller: _Poller, uri: str) -> None:
        """Let a connection fetch a subscription's calls, if it is its own. Raises
        UntrustedThumbprint.
        """
        stream = poller.stream
        pinned = self._pinned(uri)
        with self._lock:
            subscription = self._subscription(uri)
            subscription.is_pinned = pinned is not None
            others = {other.stream.certificate for other in subscription.pollers}
            if pinned is not None and not is_pinned(stream.certificate, [pinned]):
                reason = 'is pinned to %s' % pinned
            elif others - {stream.certificate}:
                reason = 'is in use by another tentacle'
            else:
                subscription.pollers.append(poller)
                poller.subscription = subscription
                logger.info('%s: polls for %s', stream.peer, uri)
                return
            self._tidy(subscription)
        raise UntrustedThumbprint(
            'the thumbprint %s may not poll for %s, which %s' % (stream.thumbprint, uri, reason),
            stream.thumbprint,
        )

    # -- the thread for the idle ones; what it shares with the others is under the lock

    def _stay_idle(self, poller: _Poller) -> None:
        self._idle[poller] = time.monotonic() + self._limits.keep_alive
        self._idle.move_to_end(poller)

    def _make_idle(self, poller: _Poller) -> None:
        self._stay_idle(poller)
        self._selector.register(poller, selectors.EVENT_READ, poller)
        if len(self._idle) == 1:
            self._wake()

    def _take_from_idle(self, poller: _Poller) -> None:
        del self._idle[poller]
        self._selector.unregister(poller)

    def _give_thread(self, poller: _Poller) -> None:
        self._take_from_idle(poller)
        try:
            start_connection_thread('connection ' + poller.stream.peer, self._poll, poller)
        except OSError as error:  # the system has none to give
            logger.error('%s: %s', poller.stream.peer, error)
            self._make_idle(poller)

    def _wake(self) -> None:
        self._wake_ends[1].send(b'x')

    def _watch(self) -> None:
        while not self._closed:
            with self._lock:
                due = next(iter(self._idle.values()), None)
            seconds = None if due is None else max(due - time.monotonic(), 0)
            ready = [key.data for key, _ in self._selector.select(seconds)]
            if None in ready:
                self._wake_ends[0].recv(4096)
            with self._lock:
                left = [poller for poller in ready if poller in self._idle and self._left(poller)]
                for poller in left:
                    self._take_from_idle(poller)
                silent = [poller for poller in self._due() if not self._sends_null(poller)]
                for poller in silent:
                    self._take_from_idle(poller)
            for poller in left + silent:
                self._forget(poller)

    def _left(self, poller: _Poller) -> bool:
        """Whether what came from an idle connection is its end; NEXT is answered."""
        with self._listener.reporting(poller.stream.peer):
            if not poller.is_asked:
                return poller.stream.has_more()
            if not poller.stream.has_line():
                self._give_thread(poller)  # which may wait for the rest
                return False
            if poller.exchange.asks_for_more():
                if poller.stream.has_more():
                    raise ProtocolError('%s goes on after NEXT' % poller.stream.peer)
                poller.is_asked = False
                poller.last_seen = poller.subscription.last_seen = time.time()
                self._stay_idle(poller)
                self._hand_out(poller.subscription)
                return False
        return True

    def _due(self) -> List[_Poller]:
        """Those whose null request is due, or nearly so: many in one turn cost less."""
        soon = time.monotonic() + self._limits.keep_alive / 30
        is_due = lambda entry: entry[1] <= soon
        return [poller for poller, _ in itertools.takewhile(is_due, self._idle.items())]

    def _sends_null(self, poller: _Poller) -> bool:
        """Send the null request that is due, without waiting; unless the last was not answered."""
        with self._listener.reporting(poller.stream.peer):
            if poller.is_asked:
                raise ConnectionLost('%s does not answer a null request' % poller.stream.peer)
            poller.stream.set_timeout(0)
            poller.exchange.send_null()
            poller.is_asked = True
            self._stay_idle(poller)
            return True
        return False


# -- the way to a server in another process: Halibut again, over a Unix socket of the owner alone


#: Errors that a relay hands on, by the name that stands in the place of an error type.
_RELAYED_ERRORS = {
    'tentacle.py ' + cls.__name__: cls
    for cls in (
        ConnectionLost,
        NotDelivered,
        UntrustedThumbprint,
        ProtocolError,
        UsageError,
        TentacleError,
    )
}
RELAY_SERVICE = 'TentaclePy'  # of the relay itself, for `tentacle.py targets`


def _unix_address(path: str) -> str:
    """A socket's path, or a shorter one to it: 107 bytes are all that an address can hold."""
    if len(os.fsencode(path)) < 108 or not os.path.isdir('/proc/self/fd'):
        return path
    folder = os.open(os.path.dirname(path), _O_FOLDER)
    return '/proc/self/fd/%d/%s' % (folder, os.path.basename(path))


@contextlib.contextmanager
def _at_unix_address(path: str) -> Iterator[Tuple[socket.socket, str]]:
    """(socket, address to bind or connect it to); the socket is closed on an error."""
    address = _unix_address(path)
    sock = socket.socket(socket.AF_UNIX)
    try:
        yield sock, address
    except BaseException:
        sock.close()
        raise
    finally:
        if address != path:
            os.close(int(address.split('/')[4]))


class RelayedClient(TentacleClient):
    """Calls the services of a polling tentacle through the `serve` of a home directory."""

    def __init__(
        self, path: str, endpoint: ServiceEndPoint, identity: Identity, limits: Limits = LIMITS
    ):
        wait = limits.response + endpoint.queue_timeout
        super().__init__(endpoint, identity, limits._replace(response=wait))
        self._path = path

    def _connect(self) -> SocketStream:
        try:
            with _at_unix_address(self._path) as (sock, address):
                sock.connect(address)
                return SocketStream(sock, self._path)
        except OSError as error:
            raise NotDelivered(
                'No server for polling tentacles runs at %s (%s): start `tentacle.py serve`'
                % (self._path, error.strerror)
            )

    def _deliver(self, request: Request, take: Optional[Callable[[Response], None]]) -> Response:
        response = super()._deliver(request, take)
        if response.error is not None and response.error.error_type in _RELAYED_ERRORS:
            raise _RELAYED_ERRORS[response.error.error_type](str(response.error))
        return response


class Relay:
    """Hands on the calls of other processes of the same user to a PollingServer, from `start` to
    `stop`; nothing of them is kept on the way.
    """

    def __init__(self, path: str, server: PollingServer, limits: Limits = LIMITS, jobs: Any = None):
        self._path = path
        self._server = server
        self._limits = limits
        self._jobs = jobs  # a JobRunner
        self._lock = threading.Lock()
        self._streams: List[SocketStream] = []
        self._stopping = False
        self._thread: Optional[threading.Thread] = None

    def start(self) -> None:
        """Raises TentacleError."""
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
            with _at_unix_address(self._path) as (self._sock, address):
                self._sock.bind(address)
                os.chmod(self._path, 0o600)
                self._sock.listen(128)
        except OSError as error:
            raise TentacleError('%s can not be made: %s' % (self._path, error.strerror))
        self._thread = start_thread('relay', self._accept)

    def stop(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        self._stopping = True
        _hang_up(self._sock)
        if self._thread is not None:
            self._thread.join()
        self._sock.close()
        with self._lock:
            for stream in self._streams:
                stream.hang_up()

    def _accept(self) -> None:
        while not self._stopping:
            try:
                sock, _ = self._sock.accept()
                stream = SocketStream(sock, 'a local client')
                start_connection_thread('relayed call', self._serve, stream)
            except OSError as error:  # no descriptor, or no thread, to be had
                if not self._stopping:
                    logger.error('A local client can not be served: %s', error)
                    time.sleep(0.1)

    def _serve(self, stream: SocketStream) -> None:
        with self._lock:
            self._streams.append(stream)
        try:
            stream.set_timeout(self._limits.handshake)
            stream.read_until(end_of_greeting, self._limits.greeting)
            handler = lambda request, answer: self._hand_on(stream, request, answer)
            MessageExchange(stream, limits=self._limits).as_server(handler)
        except TentacleError as error:
            wire_logger.info('%s', error)
        finally:
            with self._lock:
                self._streams.remove(stream)
            stream.close()

    def _hand_on(
        self, stream: SocketStream, request: Request, answer: Callable[[Response], None]
    ) -> None:
        if request.service == RELAY_SERVICE:
            answer(self._own_answer(request))
            return
        answered = []

        def take(response: Response) -> None:
            answered.append(True)
            if response.error is not None and response.error.error_type in _RELAYED_ERRORS:
                response.error.error_type = None  # these are for us to say
            with contextlib.suppress(ConnectionLost):  # who asked has left: read past, and go on
                answer(response)

        try:
            self._await(stream, request, take)
        except TentacleError as error:
            if answered:
                raise
            answer(self._refusal(request, error))

    @staticmethod
    def _refusal(request: Request, error: TentacleError) -> Response:
        """An error of ours, which a RelayedClient raises as what it is."""
        kind = 'tentacle.py ' + type(error).__name__
        return Response(request.id, error=ServiceError(str(error), kind))

    def _own_answer(self, request: Request) -> Response:
        """To a call for the server itself."""
        try:
            if request.method == 'LastSeen':
                result: Any = self._server.last_seen(*request.params)
            elif request.method == 'AddJobs':
                listed, script, expires, retry_lost = request.params
                targets = [(name, ServiceEndPoint(uri, pinned)) for name, uri, pinned in listed]
                result = self._jobs.add_all(targets, script, expires, retry_lost)
            elif request.method == 'CancelJob':
                result = self._jobs.cancel(*request.params).state
            else:
                result = [connection._asdict() for connection in self._server.connections()]
            return Response(request.id, result)
        except (TypeError, ValueError) as error:
            raise ProtocolError('%s: %s' % (request.method, error))
        except TentacleError as error:
            return self._refusal(request, error)

    def _await(
        self, stream: SocketStream, request: Request, take: Callable[[Response], None]
    ) -> None:
        """Wait for the outcome of a call; withdraw it when it is not fetched in time, or when its
        caller leaves before.
        """
        from concurrent.futures import CancelledError

        endpoint = request.endpoint
        if endpoint is None or not endpoint.is_polling:
            raise ProtocolError('a call for a polling tentacle was expected')
        outcome, withdraw = self._server.submit(request, take)
        done, wake = socket.socketpair()
        with done, wake:

            def tell(outcome: Any) -> None:
                with contextlib.suppress(OSError):  # nobody waits any more
                    wake.send(b'x')

            outcome.add_done_callback(tell)
            events = select.poll()
            events.register(done, select.POLLIN)
            events.register(stream, 0)  # its end alone is of interest
            ready = events.poll(endpoint.queue_timeout * 1000)
            if not outcome.done() and withdraw():
                if ready:
                    raise ConnectionLost('who asked for it has left')
                raise self._server.not_fetched(request)
            try:
                outcome.result()
            except CancelledError:
                raise NotDelivered('The server for polling tentacles was stopped')


# -- many targets at once


class TargetResult(NamedTuple):
    """What became of a script on one of several targets.

    `state` is ok (exit code 0), failed (another one), unreachable (it was not started), lost (its
    end is not known), cancelled, or skipped (too many others had failed).
    """

    target: str
    state: str
    exit_code: Optional[int]  # None where the script's end is not known
    seconds: float
    error: str  # '' with ok and failed


class FanOut:
    """Runs something on many targets, on so many at once, in waves of `rolling` where that is
    given; when more than `max_fail` have failed, no other one is begun.

    `run_on` gets a target, and gives an exit code or raises TentacleError; it is called in threads
    that hold nobody up who leaves. `stop` has it cancelled.
    """

    def __init__(
        self,
        run_on: Callable[[str], int],
        parallel: int = 32,
        rolling: Optional[int] = None,
        max_fail: Optional[int] = None,
        limits: Limits = LIMITS,
    ):
        import queue

        if parallel < 1 or rolling is not None and rolling < 1:
            raise UsageError('parallel and rolling must be 1 or more')
        self.stop = threading.Event()
        self._begun: Set[str] = set()
        self._run_on = run_on
        self._parallel = parallel
        self._rolling = rolling
        self._max_fail = max_fail
        self._limits = limits
        self._lock = threading.Lock()
        self._failures = 0
        self._threads: List[threading.Thread] = []
        self._results: Any = queue.SimpleQueue()

    def begins(self, target: str) -> None:
        """To be called by `run_on` ahead of what has an effect there: until then who is stopped
        waits for nothing. Raises Cancelled when it was stopped already.
        """
        with self._lock:
            self._begun.add(target)
            if self.stop.is_set():
                raise Cancelled('it was not begun')

    def results(self, targets: Sequence[str]) -> Iterator[TargetResult]:
        """One for each target, as they come; who stops asking for more has the rest cancelled."""
        size = self._rolling or len(targets)
        deadline = None
        try:
            for start in range(0, len(targets), size or 1):
                yield from self._wave(targets[start : start + size])
        except BaseException:
            deadline = time.monotonic() + self._limits.cancelled_script
            raise
        finally:
            self.stop.set()
            for thread in self._threads if deadline is not None else ():
                thread.join(max(deadline - time.monotonic(), 0))

    def _wave(self, targets: Sequence[str]) -> Iterator[TargetResult]:
        begin = time.monotonic()
        waiting = set(targets)
        queue = iter(targets)
        for _ in range(min(self._parallel, len(targets))):
            self._threads.append(start_thread('target', self._work, queue))
        deadline = None
        while waiting:
            if self.stop.is_set() and deadline is None and self._results.empty():
                deadline = time.monotonic() + self._limits.cancelled_script
                with self._lock:
                    unbegun = sorted(waiting - self._begun)
                for target in unbegun:
                    waiting.remove(target)
                    seconds = time.monotonic() - begin
                    yield TargetResult(target, 'cancelled', None, seconds, 'it was not begun')
            if deadline is not None and time.monotonic() > deadline and self._results.empty():
                for target in sorted(waiting):
                    text = 'it does not answer; what was begun there may go on'
                    seconds = time.monotonic() - begin
                    yield TargetResult(target, 'cancelled', None, seconds, text)
                return
            result = self._next_result()
            if result is not None and result.target in waiting:
                waiting.remove(result.target)
                yield result

    def _next_result(self) -> Optional[TargetResult]:
        import queue

        try:
            return self._results.get(timeout=0.5)  # to see that we are to stop
        except queue.Empty:
            return None

    def _work(self, queue: Iterator[str]) -> None:
        while True:
            with self._lock:
                target = next(queue, None)
                too_many = self._max_fail is not None and self._failures > self._max_fail
            if target is None:
                return
            if self.stop.is_set():
                result = TargetResult(target, 'cancelled', None, 0.0, 'it was not begun')
            elif too_many:
                result = TargetResult(target, 'skipped', None, 0.0, 'too many others have failed')
            else:
                result = self._attempt(target)
            with self._lock:
                self._begun.add(target)
                self._failures += result.state != 'ok'
                self._results.put(result)

    def _attempt(self, target: str) -> TargetResult:
        begun = time.monotonic()
        exit_code, error = None, ''
        try:
            exit_code = self._run_on(target)
            state = 'ok' if exit_code == 0 else 'failed'
        except Cancelled as cancelled:
            state, error = 'cancelled', str(cancelled)
        except (NotDelivered, UntrustedThumbprint, UsageError) as reason:
            state, error = 'unreachable', str(reason)
        except (TentacleError, OSError) as reason:
            state, error = 'lost', str(reason)
        except Exception as bug:
            logger.exception('%s: a bug', target)
            state, error = 'lost', 'a bug: %s' % bug
        return TargetResult(target, state, exit_code, time.monotonic() - begun, error)


# -- jobs that are kept: a database that `serve` alone writes


#: A job's life. The last five are its end.
JOB_STATES = (
    'waiting',  # nothing was sent
    'sent',  # the tentacle may have it, or not
    'running',
    'ended',  # its outcome is here, its workspace is still there
    'finished',
    'cancelled',
    'expired',
    'lost',  # the tentacle does not know it any more
    'failed',  # the tentacle, or the target, refuses it
)
_JOB_IS_OVER = frozenset(JOB_STATES[4:])  # from `finished` on
_JOB_IS_OVER_SQL = 'state IN (%s)' % ', '.join("'%s'" % state for state in JOB_STATES[4:])


class Job(NamedTuple):
    """A row of the database; times in milliseconds since 1970."""

    number: int
    target: str
    uri: str
    thumbprint: Optional[str]
    script: str
    ticket: str  # chosen ahead of its first sending, so that a second one is harmless
    service: str  # '' until the tentacle was asked: V2 or V1
    state: str
    exit_code: Optional[int]
    error: str
    created: int
    started: Optional[int]
    ended: Optional[int]
    expires: Optional[int]  # it is not sent from then on
    next_log: int  # the tentacle's number of the next line
    base: int  # our number of the tentacle's first line
    cancel: int  # somebody wants it cancelled
    retry_lost: int  # begin it anew when it was lost
    characters: int  # of the output that is kept

    @property
    def is_over(self) -> bool:
        return self.state in _JOB_IS_OVER


#: What makes a database of each version one of the next; a kill leaves either.
_JOB_MIGRATIONS = (
    """
BEGIN;
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, target TEXT NOT NULL, uri TEXT NOT NULL,
    thumbprint TEXT, script TEXT NOT NULL, ticket TEXT NOT NULL, service TEXT NOT NULL,
    state TEXT NOT NULL, exit_code INTEGER, error TEXT NOT NULL, created INTEGER NOT NULL,
    started INTEGER, ended INTEGER, expires INTEGER, next_log INTEGER NOT NULL,
    base INTEGER NOT NULL, cancel INTEGER NOT NULL, retry_lost INTEGER NOT NULL);
CREATE INDEX jobs_by_state ON jobs (state);
CREATE TABLE lines (
    job INTEGER NOT NULL REFERENCES jobs (number) ON DELETE CASCADE, number INTEGER NOT NULL,
    source INTEGER NOT NULL, occurred INTEGER NOT NULL, text TEXT NOT NULL,
    PRIMARY KEY (job, number)) WITHOUT ROWID;
PRAGMA user_version = 1;
COMMIT;
""",
    """
BEGIN;
ALTER TABLE jobs ADD COLUMN characters INTEGER NOT NULL DEFAULT 0;
PRAGMA user_version = 2;
COMMIT;
""",
)


class JobStore:
    """`<home>/jobs.db`. One process writes, any may read. Any thread may call.

    Raises TentacleError when the database can not be used.
    """

    def __init__(self, home: str, read_only: bool = False):
        import sqlite3

        self.path = os.path.join(home, 'jobs.db')
        self._lock = threading.Lock()
        self._errors = sqlite3.Error
        self._database: Any = None
        try:
            with self._told():
                self._open(sqlite3.connect, read_only)
        except BaseException:
            self.close()
            raise

    def _open(self, connect: Callable[..., Any], read_only: bool) -> None:
        from urllib.parse import quote

        if not read_only:  # for nobody else's eyes
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        address = 'file:%s?mode=%s' % (quote(self.path), 'ro' if read_only else 'rw')
        self._database = connect(address, uri=True, check_same_thread=False)
        (version,) = self._database.execute('PRAGMA user_version').fetchone()
        if version > len(_JOB_MIGRATIONS):
            raise TentacleError(
                '%s is from a newer tentacle.py (its version is %d, ours %d): use that one'
                % (self.path, version, len(_JOB_MIGRATIONS))
            )
        self._database.execute('PRAGMA foreign_keys = ON')
        if not read_only:
            if not version:
                self._database.execute('PRAGMA auto_vacuum = INCREMENTAL')
            self._database.execute('PRAGMA journal_mode = WAL')
            self._database.execute('PRAGMA synchronous = NORMAL')
            for migration in _JOB_MIGRATIONS[version:]:
                self._database.executescript(migration)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            with self._lock:
                yield
        except (self._errors, OSError) as error:
            raise TentacleError(
                'The jobs in %s can not be used: %s. It must be a database of ours, which this '
                'user may write together with its folder, and its disk must have room'
                % (self.path, error)
            )

    def close(self) -> None:
        with self._lock:
            if self._database is not None:
                self._database.close()

    def add_all(
        self,
        targets: Sequence[Tuple[str, ServiceEndPoint]],
        script: str,
        expires: Optional[int] = None,
        retry_lost: bool = False,
    ) -> List[int]:
        """The numbers of new jobs, one for each (name, endpoint), which are on the disk, all or
        none.
        """
        created = int(time.time() * 1000)
        numbers = []
        with self._told(), self._durable(), self._database:
            for target, endpoint in targets:
                row = (target, endpoint.uri, endpoint.thumbprint, script, new_ticket(), '')
                row += ('waiting', '', created, expires, 0, 0, 0, int(retry_lost))
                cursor = self._database.execute(
                    'INSERT INTO jobs (target, uri, thumbprint, script, ticket, service, state,'
                    ' error, created, expires, next_log, base, cancel, retry_lost)'
                    ' VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)',
                    row,
                )
                numbers.append(cursor.lastrowid)
        return numbers

    @contextlib.contextmanager
    def _durable(self, wanted: bool = True) -> Iterator[None]:
        """What is written within survives a power cut; else a kill alone. With the lock."""
        if wanted:
            self._database.execute('PRAGMA synchronous = FULL')
        try:
            yield
        finally:
            self._database.execute('PRAGMA synchronous = NORMAL')

    def jobs(self, everything: bool = True) -> List[Job]:
        """All, or those that are not over, oldest first; with the beginning of their scripts."""
        short = {'script': 'substr(script, 1, 200)'}
        columns = ', '.join(short.get(name, name) for name in Job._fields)
        query = 'SELECT ' + columns + ' FROM jobs%s ORDER BY number'
        where = '' if everything else ' WHERE NOT ' + _JOB_IS_OVER_SQL
        with self._told():
            return [Job(*row) for row in self._database.execute(query % where)]

    def job(self, number: int) -> Job:
        """Raises UsageError when there is none."""
        with self._told():
            row = self._database.execute(
                'SELECT * FROM jobs WHERE number = ?', (number,)
            ).fetchone()
        if row is None:
            raise UsageError('There is no job %d' % number)
        return Job(*row)

    def lines(self, number: int, after: int = 0, most: int = 1 << 62) -> List[Tuple[int, LogEntry]]:
        """(number, entry) of the lines of a job's log from a number on, so many of them."""
        query = 'SELECT number, source, occurred, text FROM lines WHERE job = ? AND number >= ?'
        query += ' ORDER BY number LIMIT ?'
        with self._told():
            rows = self._database.execute(query, (number, after, most)).fetchall()
        return [(line, LogEntry(source, occurred, text)) for line, source, occurred, text in rows]

    def change(
        self, job: Job, lines: Iterable[LogEntry] = (), durable: bool = False, **columns: Any
    ) -> Job:
        """Change columns, and add lines that begin at its next number, as one. What is callable
        gives its column's value once the lines are there.
        """
        names = ', '.join('%s = ?' % name for name in columns)
        added = (
            (job.number, job.base + job.next_log + i, entry[0], entry[1], entry[2])
            for i, entry in enumerate(lines)
        )
        with self._told(), self._durable(durable), self._database:
            self._database.executemany('INSERT INTO lines VALUES (?, ?, ?, ?, ?)', added)
            values = [value() if callable(value) else value for value in columns.values()]
            self._database.execute(
                'UPDATE jobs SET %s WHERE number = ?' % names, (*values, job.number)
            )
        return self.job(job.number)

    def prune(self, seconds: float, count: int) -> None:
        """Forget those that ended so long ago, and the oldest beyond a count, with their logs."""
        over = _JOB_IS_OVER_SQL
        with self._told(), self._database:
            self._database.execute(
                'DELETE FROM jobs WHERE %s AND ended < ?' % over,
                (int((time.time() - seconds) * 1000),),
            )
            self._database.execute(
                'DELETE FROM jobs WHERE %s AND number NOT IN'
                ' (SELECT number FROM jobs WHERE %s ORDER BY number DESC LIMIT ?)' % (over, over),
                (count,),
            )
        with self._told():  # what they took belongs to the disk again
            self._database.execute('PRAGMA incremental_vacuum').fetchall()
            self._database.execute('PRAGMA wal_checkpoint(TRUNCATE)').fetchall()


class _BoundedLines:
    """The lines of an answer as far as they are kept of a job, and one that says so where the rest
    is not: an iterable of LogEntry.
    """

    def __init__(self, job: Job, lines: Iterable[LogEntry], limits: Limits):
        self._job = job
        self._lines = lines
        self._limits = limits
        self.characters = job.characters  #: kept so far; more than their limit from that line on

    def __iter__(self) -> Iterator[LogEntry]:
        limits = self._limits
        room = limits.job_lines - self._job.base - self._job.next_log
        for index, entry in enumerate(self._lines):
            if self.characters > limits.job_characters:
                return
            self.characters += len(entry.text)
            if self.characters > limits.job_characters or index >= room:
                text = 'The rest of the output is not kept: %d lines, or %d characters, are'
                text %= (limits.job_lines, limits.job_characters)
                entry = LogEntry(STDERR, int(time.time() * 1000), text)
                self.characters = limits.job_characters + 1
            yield entry


class JobRunner:
    """Brings the jobs of a store to their ends, from `start` to `stop`, each by one call after the
    other, in a few threads for all. What `stop` or a kill interrupts goes on at the next `start`.

    `client_of` gives a client for a job's endpoint; `is_there` says whether a polling tentacle is
    connected, and `look` is to be called when one comes.
    """

    _PAUSES = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)  # seconds between questions while nothing comes
    _THREADS = 32
    _MOST_THREADS = 512  # with one more for each call of a listening target, which may be dead

    def __init__(
        self,
        store: JobStore,
        client_of: Callable[[str, ServiceEndPoint], Any],
        is_there: Callable[[str], bool],
        keep: Tuple[float, int] = (30 * 86400.0, 10000),
        limits: Limits = LIMITS,
    ):
        """`keep`: so many seconds and jobs that are over, see `JobStore.prune`."""
        self._store = store
        self._keep = keep
        self._ended = 0
        self._client_of = client_of
        self._is_there = is_there
        self._limits = limits
        self._changed = threading.Condition(threading.RLock())
        self._due: List[Tuple[float, int]] = []  # a heap of (moment, job)
        self._planned: Dict[int, float] = {}  # the moment of each; any other in the heap is stale
        self._at_work: Set[int] = set()
        self._again: Set[int] = set()  # to be looked at when its step is over
        self._absent: Dict[str, Set[int]] = {}  # the jobs of a subscription that nobody polls
        self._quiet: Dict[int, int] = {}  # steps without news
        self._failures: Dict[int, int] = {}  # the same of steps that failed
        self._uris: Dict[int, str] = {}  # of the jobs that are not over
        self._busy: Dict[str, int] = {}  # steps under way for each tentacle
        self._held: Dict[str, List[int]] = {}  # due, but there are enough of those
        self._stopping = False
        self._outward = 0  # steps under way for listening targets
        self._idle = 0  # threads that wait for a step
        self._threads: Set[threading.Thread] = set()

    def start(self) -> None:
        """Go on with what is not over."""
        self._store.prune(*self._keep)
        for job in self._store.jobs(everything=False):
            self._uris[job.number] = job.uri
            self._plan(job.number, 0)
        with self._changed:
            self._add_thread()

    def _add_thread(self) -> None:
        """With the lock: see that somebody waits for the next step, as far as there may be more."""
        most = min(self._THREADS + self._outward, self._MOST_THREADS)
        if not (self._idle or self._stopping) and len(self._threads) < most:
            self._threads.add(start_thread('jobs', self._work))

    def stop(self) -> None:
        """Begin no other call; the jobs stay as they are."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def join(self) -> None:
        """Wait for the calls under way, after `stop`."""
        deadline = time.monotonic() + self._limits.stop
        with self._changed:
            threads = list(self._threads)
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0))

    def add(self, target: str, endpoint: ServiceEndPoint, *arguments: Any, **options: Any) -> int:
        """The same of one; its number."""
        return self.add_all([(target, endpoint)], *arguments, **options)[0]

    def add_all(
        self, targets: Sequence[Tuple[str, ServiceEndPoint]], *arguments: Any, **options: Any
    ) -> List[int]:
        """As `JobStore.add_all`."""
        numbers = self._store.add_all(targets, *arguments, **options)
        for number, (_, endpoint) in zip(numbers, targets):
            self._uris[number] = endpoint.uri
            self._plan(number, 0)
        return numbers

    def cancel(self, number: int) -> Job:
        """Have a job cancelled; one that is over stays as it is. A second time, one whose tentacle
        can not be reached is given up.
        """
        job = self._store.job(number)
        if job.is_over:
            return job
        with self._changed:
            is_free = number not in self._at_work
        if is_free and (job.cancel or job.state == 'waiting'):
            if job.state == 'waiting':
                self._end(job, 'cancelled', 'it was cancelled ahead of its start')
            else:
                self._end(job, 'lost', 'it was cancelled, and its tentacle was not reached')
            return self._store.job(number)
        job = self._store.change(job, cancel=1)
        self._plan(number, 0)
        return job

    def look(self, uri: str) -> None:
        """A tentacle polls for this subscription: its jobs can go on."""
        with self._changed:
            numbers = self._absent.pop(uri, set())
        for number in numbers:
            self._plan(number, 0)

    def _plan(self, number: int, seconds: float) -> None:
        import heapq

        with self._changed:
            if number in self._at_work:
                self._again.add(number)
                return
            moment = time.monotonic() + seconds
            if moment < self._planned.get(number, float('inf')):
                self._planned[number] = moment
                heapq.heappush(self._due, (moment, number))
                self._changed.notify()

    def _work(self) -> None:
        while True:
            number = self._next()
            if number is None:
                return
            uri = self._uris.get(number, '')
            seconds: Optional[float] = None
            try:
                seconds = self._look_after(number)
            except TentacleError as error:
                logger.error('Job %d: %s', number, error)
                seconds = 5.0
            except Exception:  # a bug; the others go on
                logger.exception('Job %d', number)
                seconds = 60.0
            self._release(uri)
            with self._changed:
                self._at_work.discard(number)
                if number in self._again:
                    self._again.discard(number)
                    seconds = 0
            if seconds is not None:
                self._plan(number, seconds)

    def _look_after(self, number: int) -> Optional[float]:
        try:
            job = self._store.job(number)
        except UsageError:
            return None  # it was pruned
        return self._step(job)

    def _release(self, uri: str) -> None:
        """A step is over: another one of its tentacle may be taken."""
        with self._changed:
            self._outward -= uri.startswith('https:')
            self._busy[uri] = self._busy.get(uri, 1) - 1
            if not self._busy[uri]:
                del self._busy[uri]
            if self._held.get(uri):
                held = self._held[uri].pop(0)
                if not self._held[uri]:
                    del self._held[uri]
                self._plan(held, 0)

    def _next(self) -> Optional[int]:
        """Waits for the next job that is due; None when this thread is to end."""
        import heapq

        with self._changed:
            while not self._stopping:
                if len(self._threads) > self._THREADS + self._outward:
                    break  # those that made us necessary are over
                left = self._due[0][0] - time.monotonic() if self._due else None
                if left is None or left > 0:
                    self._idle += 1
                    self._changed.wait(None if left is None else min(left, 3600.0))
                    self._idle -= 1
                    continue
                moment, number = heapq.heappop(self._due)
                if self._planned.get(number) != moment:
                    continue
                del self._planned[number]
                uri = self._uris.get(number, '')
                if self._busy.get(uri, 0) < self._limits.job_steps:
                    self._busy[uri] = self._busy.get(uri, 0) + 1
                    self._at_work.add(number)
                    self._outward += uri.startswith('https:')
                    self._add_thread()
                    return number
                if number not in self._held.setdefault(uri, []):
                    self._held[uri].append(number)
            self._threads.discard(threading.current_thread())
        return None

    def _step(self, job: Job) -> Optional[float]:
        """One call for a job; the seconds to its next one, None when it is over or must wait for
        its tentacle.
        """
        now = int(time.time() * 1000)
        if job.is_over:
            return None
        if job.state == 'waiting' and job.cancel:
            return self._end(job, 'cancelled', 'it was cancelled ahead of its start')
        if job.state == 'waiting' and job.expires is not None and job.expires <= now:
            return self._end(job, 'expired', 'nobody fetched it in its time')
        endpoint = ServiceEndPoint(job.uri, job.thumbprint, queue_timeout=10.0)
        if endpoint.is_polling and not self._is_there(job.uri):
            if job.state == 'ended':  # the tentacle will clean up by itself
                return self._end(job, 'finished', '')
            with self._changed:
                self._absent.setdefault(job.uri, set()).add(job.number)
            if self._is_there(job.uri):  # it came meanwhile
                self.look(job.uri)
            if job.state != 'waiting' or job.expires is None:
                return None
            return max(job.expires - now, 0) / 1000
        try:
            return self._advance(job, self._client_of(job.target, endpoint))
        except (ProtocolError, ServiceError) as error:
            return self._end(job, 'failed', str(error))
        except (ConnectionLost, UntrustedThumbprint, UsageError) as error:
            self._store.change(self._store.job(job.number), error=printable(error, 2000))
            return self._longer_pause(job)

    def _longer_pause(self, job: Job) -> float:
        """Seconds after a failure, more with each in a row."""
        failures = self._failures[job.number] = self._failures.get(job.number, 0) + 1
        return min(2.0**failures, 60.0)

    def _advance(self, job: Job, client: Any) -> Optional[float]:
        """Raises TentacleError."""
        if job.service == '':
            service = 'V2' if 'IScriptServiceV2' in client.capabilities() else 'V1'
            job = self._store.change(job, service=service)
        calls: Any = (_ScriptCallsV2 if job.service == 'V2' else _ScriptCallsV1)(client, job.ticket)
        if job.state == 'ended':
            with contextlib.suppress(ServiceError, ProtocolError):
                calls.complete(job.next_log)
            was_cancelled = job.exit_code == CANCELED_EXIT_CODE
            return self._end(job, 'cancelled' if was_cancelled else 'finished', '')
        if job.state == 'sent' and job.service == 'V1':
            return self._lose(job, 'whether it was started is not known')
        if job.state in ('waiting', 'sent') and not job.cancel:
            status = self._start(job, calls)
        else:
            status = calls.cancel(job.next_log) if job.cancel else calls.status(job.next_log)
        return self._take(job, calls, status)

    def _start(self, job: Job, calls: Any) -> Any:
        """The first status. What is on the disk ahead of each step says what is to be done when it
        is the last one.
        """
        started = job.started or int(time.time() * 1000)
        self._store.change(job, durable=job.service == 'V1', state='sent', started=started)
        try:
            return calls.start(job.script, 'job %d' % job.number, [], 0.0)
        except NotDelivered:
            if job.state == 'waiting':
                self._store.change(job, state='waiting', started=job.started)
            raise
        except ConnectionLost:
            if calls.ticket != job.ticket:  # it was started by V1, and only asking failed
                self._store.change(job, state='running', ticket=calls.ticket[:200])
            raise

    def _take(self, job: Job, calls: Any, status: Any) -> Optional[float]:
        if not 0 <= status.next_log_sequence < 1 << 40:
            raise ProtocolError('a number of a log line is impossible')
        if status.exit_code == UNKNOWN_TICKET_EXIT_CODE and status.state == COMPLETE:
            if job.state == 'sent' and job.cancel:
                return self._end(job, 'lost', 'whether it was started is not known')
            return self._lose(job, 'the tentacle does not know it any more')
        self._failures.pop(job.number, None)
        bounded = _BoundedLines(job, status.logs, self._limits)
        columns: Dict[str, Any] = {'state': 'running', 'error': '', 'ticket': calls.ticket[:200]}
        columns['characters'] = lambda: bounded.characters
        columns['next_log'] = max(job.next_log, status.next_log_sequence)
        if status.state == COMPLETE:
            columns.update(state='ended', exit_code=status.exit_code)
        has_news = columns['next_log'] > job.next_log
        job = self._store.change(job, bounded, **columns)
        if job.state == 'ended':
            return 0
        quiet = self._quiet[job.number] = 0 if has_news else self._quiet.get(job.number, 0) + 1
        return self._PAUSES[min(quiet, len(self._PAUSES) - 1)]

    def _lose(self, job: Job, reason: str) -> Optional[float]:
        if not job.retry_lost or job.cancel:
            return self._end(job, 'lost', reason)
        text = 'It was lost (%s), and is begun anew' % reason
        entry = LogEntry(STDERR, int(time.time() * 1000), text)
        base = job.base + job.next_log + 1
        self._store.change(
            job, [entry], state='waiting', ticket=new_ticket(), next_log=0, base=base, service=''
        )
        return self._longer_pause(job)

    def _end(self, job: Job, state: str, error: str) -> None:
        ended = int(time.time() * 1000)
        self._store.change(job, state=state, error=printable(error, 2000), ended=ended)
        with self._changed:
            facts: Any
            for facts in (self._quiet, self._failures, self._uris):
                facts.pop(job.number, None)
            self._absent.get(job.uri, set()).discard(job.number)
            if not self._absent.get(job.uri, True):
                del self._absent[job.uri]
        self._ended += 1
        if self._ended % 100 == 0:
            self._store.prune(*self._keep)


# ---- 18. Configuration ---------------------------------------------------------------------------
# The settings file is the original's: flat XML, one `set` a key; keys that are not ours are kept as
# they are.

SETTINGS_NAME = 'tentacle-default.config'
DEFAULT_INSTANCE = 'Tentacle'
CERTIFICATE_NAME = 'tentacle.pem'

KEY_HOME = 'Octopus.Home'
KEY_PORT = 'Tentacle.Services.PortNumber'
KEY_LISTEN_IP = 'Tentacle.Services.ListenIP'
KEY_TRUSTED = 'Tentacle.Communication.TrustedOctopusServers'
KEY_NO_LISTEN = 'Tentacle.Services.NoListen'
KEY_POLLING_CONNECTIONS = 'Tentacle.Communication.PollingConnectionCount'
KEY_APPLICATIONS = 'Tentacle.Deployment.ApplicationDirectory'
KEY_THUMBPRINT = 'Tentacle.CertificateThumbprint'
KEY_CERTIFICATE = 'Tentacle.Certificate'  # the original's: a PFX, encrypted; we only read it
KEY_PROXY = 'Octopus.Proxy.'  # of scripts
KEY_POLLING_PROXY = 'Octopus.Server.Proxy.'
KEY_CERTIFICATE_FILE = 'TentaclePy.CertificateFile'  # ours: the PEM file, relative to the settings
KEY_FILES_ROOT = 'TentaclePy.FilesRoot'  # ours: the folder outside which no file is transferred
KEY_JOB_DAYS = 'TentaclePy.JobDays'  # ours: how long `serve` keeps a job that is over
KEY_JOB_COUNT = 'TentaclePy.JobCount'  # ours: and how many of them
KEY_SUBSCRIPTION = 'TentaclePy.Subscription'  # ours: of `poll`, made once

#: `CommunicationStyle` of a trusted server, by its number and by its name.
STYLE_LISTENING, STYLE_POLLING = 1, 2
_STYLE_NAMES = {'tentaclepassive': STYLE_LISTENING, 'tentacleactive': STYLE_POLLING}


class TrustedServer(NamedTuple):
    """A server that may call us; where `style` is STYLE_POLLING, we poll it."""

    thumbprint: str
    style: int = STYLE_LISTENING
    address: str = ''  # https://server:10943/ to poll
    subscription: str = ''  # poll://.../

    @classmethod
    def from_document(cls, document: Dict[str, Any]) -> 'TrustedServer':
        style = document.get('CommunicationStyle')
        if isinstance(style, str):
            style = _STYLE_NAMES.get(style.lower(), 0)
        return cls(
            str(document.get('Thumbprint') or '').strip().upper(),
            style if isinstance(style, int) else 0,
            str(document.get('Address') or ''),
            str(document.get('SubscriptionId') or ''),
        )

    def to_document(self) -> Dict[str, Any]:
        return {
            'Thumbprint': self.thumbprint,
            'CommunicationStyle': self.style,
            'Address': self.address or None,
            'Squid': None,
            'SubscriptionId': self.subscription or None,
        }


class ProxySettings(NamedTuple):
    """One of the two proxies of a settings file; its password as it stands there, encrypted."""

    use_default: bool = True
    host: str = ''
    port: int = 80
    user: str = ''
    password: str = ''

    def proxy_of(self, uri: str) -> Optional[Proxy]:
        """The proxy to an https URI. Raises TentacleError, UsageError."""
        if self.host:
            return Proxy(self.host, self.port, self.user, self.secret())
        return proxy_of_environment(uri) if self.use_default else None

    def secret(self) -> Secret:
        """The password. Raises TentacleError."""
        return Secret(self.password and unprotect(self.password, "The proxy's password"))


class Settings(NamedTuple):
    """What the settings file says, with the defaults of what it does not say."""

    path: str  # of the settings file
    home: str
    port: int
    listen_address: str  # '' = any
    no_listen: bool
    servers: Tuple[TrustedServer, ...]  # in the order of the file
    polling_connections: int  # to each server
    applications: str
    certificate_path: str  # of the PEM file, which may not be there yet
    original_certificate: str  # the original's, encrypted; '' = none
    thumbprint: str  # of the certificate that is in use, as the file says
    proxy: ProxySettings  # for scripts
    polling_proxy: ProxySettings
    files_root: str  # '' = files are transferred from and to anywhere
    subscription: str  # poll://.../ of `poll`; '' = not made yet
    job_days: int  # how long `serve` keeps a job that is over
    job_count: int  # and how many
    values: Mapping[str, str]  # the keys and texts of the file

    @property
    def trusted(self) -> Tuple[str, ...]:
        """Their thumbprints."""
        return tuple(server.thumbprint for server in self.servers if server.thumbprint)

    def polled(self) -> List[TrustedServer]:
        """Those that a polling tentacle dials, each once."""
        chosen = [server for server in self.servers if server.style == STYLE_POLLING]
        return list(OrderedDict.fromkeys(chosen))


def read_settings_file(path: str) -> Dict[str, str]:
    """The keys and texts of a settings file; {} where there is none. Raises TentacleError when it
    is damaged.
    """
    from xml.etree import ElementTree

    try:
        root = ElementTree.parse(path).getroot()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise TentacleError('The settings %s can not be read: %s' % (path, error.strerror))
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise TentacleError(
            'The settings %s are damaged (%s): mend the file, or move it away to start anew'
            % (path, error)
        )
    if root.tag != 'octopus-settings':
        raise TentacleError(
            '%s is no settings file: octopus-settings expected, %s found'
            % (path, printable(root.tag))
        )
    return {element.get('key', ''): element.text or '' for element in root.iter('set')}


def _settings_xml(values: Dict[str, str]) -> bytes:
    from xml.sax.saxutils import escape, quoteattr

    for key, text in values.items():
        if re.search('[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]', key + text):
            raise UsageError('%s has characters that a settings file can not hold' % printable(key))
    lines = [
        '  <set key=%s>%s</set>' % (quoteattr(key), escape(text, {'\r': '&#13;'}))
        for key, text in sorted(values.items())
    ]
    return '\n'.join(
        [
            '<?xml version="1.0" encoding="utf-8"?>',
            '<octopus-settings xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" '
            'xmlns:xsd="http://www.w3.org/2001/XMLSchema">',
        ]
        + lines
        + ['</octopus-settings>', '']
    ).encode()


@contextlib.contextmanager
def locked_folder(folder: str) -> Iterator[None]:
    """Keep our other commands from changing a folder, which is made where it is missing.

    Raises TentacleError.
    """
    import fcntl

    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise TentacleError(
            '%s can not be used: %s. Choose another folder with --home DIR or $TENTACLE_HOME'
            % (folder, error.strerror)
        )
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def change_settings(path: str, change: Callable[[Dict[str, str]], None]) -> None:
    """Read, change and replace the settings file, while no other of our commands does.

    Raises TentacleError.
    """
    with locked_folder(os.path.dirname(path)):
        values = read_settings_file(path)
        before = dict(values)
        change(values)
        if values != before or not os.path.exists(path):
            write_private(os.path.realpath(path), _settings_xml(values))


def read_trusted(path: str, values: Dict[str, str]) -> List[Dict[str, Any]]:
    """The trusted servers as the settings have them: documents with `Thumbprint`,
    `CommunicationStyle` ...
    """
    text = values.get(KEY_TRUSTED, '').strip()
    try:
        servers = json.loads(text) if text else []
        if not isinstance(servers, list) or not all(isinstance(server, dict) for server in servers):
            raise ValueError('a list of servers expected')
    except (ValueError, RecursionError) as error:
        raise TentacleError(
            '%s in %s is damaged (%s): mend it, or `tentacle.py configure --reset-trust`'
            % (KEY_TRUSTED, path, error)
        )
    return servers


def change_servers(
    path: str, change: Callable[[List[Dict[str, Any]]], List[Dict[str, Any]]], reset: bool = False
) -> None:
    """Change the list of trusted servers, which are documents. Raises TentacleError."""

    def change_values(values: Dict[str, str]) -> None:
        servers = change([] if reset else read_trusted(path, values))
        values[KEY_TRUSTED] = json.dumps(servers, separators=(',', ':'))

    change_settings(path, change_values)


def _has_thumbprint(server: Dict[str, Any], thumbprints: Container[str]) -> bool:
    return str(server.get('Thumbprint')).strip().upper() in thumbprints


def change_trust(
    path: str, add: Sequence[str] = (), remove: Sequence[str] = (), reset: bool = False
) -> None:
    """Reset first, then remove, then add thumbprints. Raises TentacleError, UsageError."""
    added = [parse_thumbprint(text) for text in add]
    removed = [parse_thumbprint(text) for text in remove]

    def change(servers: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
        servers = [server for server in servers if not _has_thumbprint(server, removed)]
        for thumbprint in added:
            if not any(_has_thumbprint(server, [thumbprint]) for server in servers):
                servers.append(TrustedServer(thumbprint).to_document())
        return servers

    change_servers(path, change, reset)


def trust_server(path: str, added: TrustedServer, alone: bool = False) -> None:
    """Add a server, in the place of an entry of its thumbprint for the same address or for none,
    or of all of them (`alone`). Raises TentacleError.
    """

    def is_replaced(server: Dict[str, Any]) -> bool:
        if not _has_thumbprint(server, [added.thumbprint]):
            return False
        address = str(server.get('Address') or '')
        return alone or not address or address.rstrip('/') == added.address.rstrip('/')

    change_servers(
        path,
        lambda servers: [s for s in servers if not is_replaced(s)] + [added.to_document()],
    )


def _connections_of_environment() -> int:
    """0 where it says nothing that counts."""
    text = os.environ.get('TentaclePollingConnectionCount', '')
    return min(max(int(text), 1), 512) if re.match(r'[0-9]{1,9}\Z', text) else 0


def read_settings(path: str) -> Settings:
    """Raises TentacleError for what the file has and we can not take."""
    values = {key: text.strip() for key, text in read_settings_file(path).items()}
    folder, name = os.path.split(path)

    def number(key: str, default: int, least: int, most: int) -> int:
        text = values.get(key) or str(default)
        if not re.match(r'[0-9]{1,9}\Z', text) or not least <= int(text) <= most:
            raise TentacleError(
                '%s in %s must be a number from %d to %d, and is %s'
                % (key, path, least, most, printable(text))
            )
        return int(text)

    def boolean(key: str, default: bool) -> bool:
        text = values.get(key) or str(default)
        if text.lower() not in ('true', 'false'):
            raise TentacleError(
                '%s in %s must be true or false, and is %s' % (key, path, printable(text))
            )
        return text.lower() == 'true'

    def proxy(prefix: str) -> ProxySettings:
        return ProxySettings(
            boolean(prefix + 'UseDefaultProxy', True),
            values.get(prefix + 'ProxyHost', ''),
            number(prefix + 'ProxyPort', 80, 1, 65535),
            values.get(prefix + 'ProxyUsername', ''),
            values.get(prefix + 'ProxyPassword', ''),
        )

    address = values.get(KEY_LISTEN_IP, '')
    certificate = CERTIFICATE_NAME
    if name != SETTINGS_NAME:  # a folder may hold the settings of several instances
        certificate = os.path.splitext(name)[0] + '.pem'
    certificate = values.get(KEY_CERTIFICATE_FILE) or certificate
    if os.path.basename(certificate) != certificate or certificate in ('.', '..'):
        raise TentacleError(
            '%s in %s must name a file in the folder of the settings, and is %s'
            % (KEY_CERTIFICATE_FILE, path, printable(certificate))
        )
    return Settings(
        path,
        os.path.normpath(os.path.join(folder, values.get(KEY_HOME) or folder)),
        number(KEY_PORT, LISTENING_PORT, 0, 65535),
        '' if address.lower() == 'any' else address,
        boolean(KEY_NO_LISTEN, False),
        tuple(map(TrustedServer.from_document, read_trusted(path, values))),
        _connections_of_environment() or number(KEY_POLLING_CONNECTIONS, 1, 1, 512),
        values.get(KEY_APPLICATIONS) or '/home/Octopus/Applications',
        os.path.join(folder, certificate),
        values.get(KEY_CERTIFICATE, ''),
        values.get(KEY_THUMBPRINT, '').upper(),
        proxy(KEY_PROXY),
        proxy(KEY_POLLING_PROXY),
        values.get(KEY_FILES_ROOT, ''),
        values.get(KEY_SUBSCRIPTION, ''),
        number(KEY_JOB_DAYS, 30, 0, 10**9 - 1),
        number(KEY_JOB_COUNT, 10000, 0, 10**9 - 1),
        values,
    )


class Instance(NamedTuple):
    """A tentacle of this machine that has a name."""

    name: str
    settings_path: str


MACHINE_HOME_VARIABLE = 'TentacleMachineConfigurationHomeDirectory'


def instances_folder() -> str:
    machine_home = os.environ.get(MACHINE_HOME_VARIABLE) or '/etc/octopus'
    return os.path.join(machine_home, 'Tentacle', 'Instances')


def _instance_record(name: str) -> str:
    """The file that names an instance's settings. Raises UsageError."""
    if not name.strip() or '/' in name or name.startswith('.') or not name.isprintable():
        raise TentacleError('%s is no name of an instance' % (printable(name) or "''"))
    return os.path.join(instances_folder(), name.lower().replace(' ', '-') + '.config')


def _read_instance(record: str) -> Optional[Instance]:
    try:
        with open(record, encoding='utf-8-sig') as file:
            facts = json.load(file)
        name, path = facts['Name'], facts['ConfigurationFilePath']
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Instance(name, path) if isinstance(name, str) and isinstance(path, str) else None


def instances() -> List[Instance]:
    """Those of this machine, by name; none where we may not see them."""
    folder = instances_folder()
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        names = []
    found = [_read_instance(os.path.join(folder, name)) for name in names if name[-7:] == '.config']
    return [instance for instance in found if instance is not None]


def instances_of(settings_path: str) -> List[Instance]:
    """Those that a settings file is of: one, as a rule."""
    return [instance for instance in instances() if instance.settings_path == settings_path]


def find_instance(name: str) -> Instance:
    """Raises TentacleError."""
    instance = _read_instance(_instance_record(name))
    if instance is None:
        known = ', '.join(known.name for known in instances()) or 'none'
        raise TentacleError(
            'Instance %s of Tentacle has not been configured on this machine. Available '
            'instances: %s. To make it: create-instance --instance NAME --config FILE'
            % (printable(name), known)
        )
    return instance


def create_instance(name: str, settings_path: str, home: Optional[str]) -> None:
    """Make the settings file where it is missing, and record the instance. Raises TentacleError."""
    record = _instance_record(name)
    known = _read_instance(record)
    if known is not None and known.name.lower() != name.lower():
        raise TentacleError(
            'The instance %s has the same record, %s: choose another name' % (known.name, record)
        )

    def change(values: Dict[str, str]) -> None:
        if home is not None:
            values[KEY_HOME] = home
        values.setdefault(KEY_HOME, os.path.dirname(settings_path))

    change_settings(settings_path, change)
    facts = {'Name': name, 'ConfigurationFilePath': settings_path}
    try:  # an agent that runs as another user must find it
        os.makedirs(os.path.dirname(record), mode=0o755, exist_ok=True)
    except OSError as error:
        raise TentacleError('%s can not be written: %s' % (record, error.strerror))
    write_private(record, json.dumps(facts, indent=2).encode(), mode=0o644)


def delete_instance(instance: Instance) -> None:
    """Forget an instance; its settings and home stay. Raises TentacleError."""
    try:
        os.unlink(_instance_record(instance.name))
    except OSError as error:
        raise TentacleError('%s can not be deleted: %s' % (instance.name, error))


def find_settings(home: Optional[str] = None) -> str:
    """The settings file: of `home`, else $TENTACLE_HOME, else the default instance's or the only
    one's, else the user's own.
    """
    home = home or os.environ.get('TENTACLE_HOME')
    if home:
        ours = os.path.join(os.path.abspath(home), SETTINGS_NAME)
        theirs = [] if os.path.exists(ours) else instances()
        paths = [entry.settings_path for entry in theirs]
        paths = [path for path in paths if os.path.dirname(path) == os.path.dirname(ours)]
        return paths[0] if len(paths) == 1 else ours
    instance = _read_instance(_instance_record(DEFAULT_INSTANCE))
    if instance:
        return instance.settings_path
    known = instances()
    if len(known) == 1:
        return known[0].settings_path
    home = '/etc/octopus/default' if os.geteuid() == 0 else os.path.expanduser('~/.tentacle')
    if home.startswith('~'):
        raise TentacleError('This user has no home directory: say where, by --home DIR')
    return os.path.join(home, SETTINGS_NAME)


def record_identity(settings: Settings, identity: Identity) -> None:
    """Name our certificate in the settings."""

    def change(values: Dict[str, str]) -> None:
        values.setdefault(KEY_HOME, settings.home)
        values[KEY_THUMBPRINT] = identity.thumbprint
        values[KEY_CERTIFICATE_FILE] = os.path.relpath(
            identity.path, os.path.dirname(settings.path)
        )

    change_settings(settings.path, change)


def _take_over(settings: Settings) -> Identity:
    """The original's identity as ours: its certificate stays in the settings. Raises
    TentacleError.
    """
    what = '%s in %s' % (KEY_CERTIFICATE, settings.path)
    pfx = unprotect(settings.original_certificate, what)
    identity = keep_identity(pfx.encode(), settings.certificate_path, what, '', settings.thumbprint)
    logger.info('The certificate of the original is ours now: %s', identity.thumbprint)
    return identity


def existing_identity(settings: Settings) -> Optional[Identity]:
    """The identity that the settings name, be it in our PEM file or encrypted by the original,
    which counts where the two differ and the settings name the thumbprint of another one than ours.
    Raises TentacleError.
    """
    try:
        identity: Optional[Identity] = load_identity(settings.certificate_path)
    except FileNotFoundError:
        identity = None
    if identity is not None and identity.thumbprint == settings.thumbprint:
        return identity
    if settings.original_certificate and (identity is None or settings.thumbprint):
        identity = _take_over(settings)
        record_identity(settings, identity)
    if identity is None and settings.thumbprint:
        raise TentacleError(
            'The certificate with the thumbprint %s is gone: %s is not there. Restore it, or make '
            'a new identity with `tentacle.py new-certificate` (the other sides must then trust '
            'its new thumbprint)' % (printable(settings.thumbprint), settings.certificate_path)
        )
    return identity


def our_identity(settings: Settings) -> Identity:
    """The identity that the settings name; a missing one is made, and named in the settings. Raises
    TentacleError.
    """
    identity = existing_identity(settings)
    if identity is not None:
        return identity
    logger.info('There is no certificate yet: %s is made', settings.certificate_path)
    with locked_folder(os.path.dirname(settings.certificate_path)):
        try:
            return load_identity(settings.certificate_path)  # another one was faster
        except FileNotFoundError:
            identity = create_identity(settings.certificate_path)
    record_identity(settings, identity)
    return identity


def our_subscription(settings: Settings) -> str:
    """The subscription that the settings name; a missing one is made, and kept in them. Raises
    TentacleError.
    """
    if settings.subscription:
        try:
            return parse_subscription(settings.subscription)
        except UsageError as error:
            raise TentacleError('%s in %s: %s' % (KEY_SUBSCRIPTION, settings.path, error))
    made = new_subscription()
    kept = ''

    def change(values: Dict[str, str]) -> None:
        nonlocal kept
        kept = values.setdefault(KEY_SUBSCRIPTION, made)  # another one may have been faster

    change_settings(settings.path, change)
    return kept


def _passwd_variables(home: str) -> Dict[str, str]:
    """What a login would set: a service, or a process in a container, may have none of it."""
    import pwd

    try:
        entry = pwd.getpwuid(os.geteuid())
    except KeyError:
        return {'HOME': home}
    shell = entry.pw_shell or '/bin/sh'
    return {'HOME': entry.pw_dir, 'USER': entry.pw_name, 'LOGNAME': entry.pw_name, 'SHELL': shell}


def script_environment(settings: Settings, instance: str = DEFAULT_INSTANCE) -> Dict[str, str]:
    """The environment of a script (wire notes 4): ours, and what deployments look for."""
    environment = dict(os.environ)
    for name in ('NOTIFY_SOCKET', 'OCTOPUS_API_KEY'):  # for us alone
        environment.pop(name, None)
    for name, value in _passwd_variables(settings.home).items():
        environment.setdefault(name, value)
    program = os.path.abspath(__file__)
    proxy = settings.proxy
    try:
        password = proxy.secret()
    except TentacleError as error:
        logger.error('Scripts get no password of the proxy: %s', error)
        password = Secret()
    environment.update(
        {
            'TentacleHome': settings.home,
            'TentacleApplications': settings.applications,
            'TentacleJournal': os.path.join(settings.home, 'DeploymentJournal.xml'),
            'CalamariPackageRetentionJournalPath': os.path.join(
                settings.home, 'PackageRetentionJournal.json'
            ),
            'TentacleInstanceName': instance,
            'TentacleVersion': TENTACLE_VERSION,
            'TentaclePyVersion': __version__,
            'TentacleCertificateSignatureAlgorithm': 'sha256RSA',
            'TentacleNetFrameworkDescription': 'Python ' + '.'.join(map(str, sys.version_info[:3])),
            'TentacleExecutablePath': program,
            'TentacleProgramDirectoryPath': os.path.dirname(program),
            'AgentProgramDirectoryPath': os.path.dirname(program),
            'TentacleUseDefaultProxy': str(proxy.use_default),
            'TentacleProxyHost': proxy.host,
            'TentacleProxyPort': str(proxy.port),
            'TentacleProxyUsername': proxy.user,
            'TentacleProxyPassword': password[:],
        }
    )
    return environment


class Watched:
    """What a file says as it is now: a look at its time for each question, and a read when it
    changed. Any thread may call. Raises TentacleError when it is made, and not from then on.
    """

    def __init__(self, path: str, read: Callable[[], Any]):
        self._path = path
        self._read = read
        self._lock = threading.Lock()
        self._seen = self._stamp()
        self._content = read()

    def _stamp(self) -> Any:
        try:
            details = os.stat(self._path)
        except OSError:
            return None
        return details.st_mtime_ns, details.st_ino, details.st_size

    def __call__(self) -> Any:
        with self._lock:
            seen = self._stamp()
            if seen is not None and seen != self._seen:  # when it is gone, what it said last holds
                before, self._seen = self._seen, seen
                try:
                    content = self._read()
                    if self._stamp() == seen:
                        self._content = content
                    else:  # it was replaced, or taken away, meanwhile: the next look will tell
                        self._seen = before
                except TentacleError as error:
                    logger.error('Who is trusted stays as it was: %s', error)
                except Exception:  # a bug
                    logger.exception('Who is trusted stays as it was')
            return self._content


class TrustedThumbprints:
    """The pinned thumbprints: those given for this run, and the settings' as they are now. Called
    for every connection, from its thread.
    """

    def __init__(self, path: str, given: Iterable[str] = ()):
        self._given = frozenset(given)
        #: the settings as they are now
        self.settings: Callable[[], Settings] = Watched(path, lambda: read_settings(path))

    def __call__(self) -> FrozenSet[str]:
        return self._given.union(self.settings().trusted)


def _set_in_section(text: str, section: str, key: str, value: str) -> str:
    """An INI text with one value changed, or added to its section; all else stays as it is."""
    lines = text.split('\n')
    start = next(i for i, line in enumerate(lines) if line.strip() == '[%s]' % section)
    end = next(
        (i for i in range(start + 1, len(lines)) if lines[i].lstrip().startswith('[')), len(lines)
    )
    for i in range(start + 1, end):
        if lines[i].split('=')[0].strip().lower() == key:
            lines[i] = '%s = %s' % (key, value)
            return '\n'.join(lines)
    return '\n'.join(lines[: start + 1] + ['%s = %s' % (key, value)] + lines[start + 1 :])


_TARGET_KEYS = ('uri', 'thumbprint', 'groups', 'proxy')


class Targets:
    """`<home>/targets`: the tentacles that a dispatcher knows, a section each, like ssh's
    known_hosts. All but the thumbprint may be left out.

        [web-1]
        uri = https://web-1:10933/
        thumbprint = 6D7A63503024C1F8CBD8B6EDCAFCD6C84726EFB3
        groups = web, eu
        proxy = http://proxy:3128
    """

    def __init__(self, home: str):
        self.path = os.path.join(home, 'targets')
        self._text = ''
        try:
            with open(self.path, encoding='utf-8-sig') as file:
                self._text = file.read()
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            raise TentacleError(
                'The targets file %s can not be read: %s. It must be UTF-8 text'
                % (self.path, error)
            )
        self._sections = self._parse()
        self._all: Optional[Dict[str, ServiceEndPoint]] = None

    def _parse(self) -> Any:
        import configparser

        parser = configparser.ConfigParser(
            interpolation=None, delimiters=('=',), default_section=''
        )
        try:
            parser.read_string(self._text, self.path)
        except configparser.Error as error:
            raise TentacleError(
                'The targets file is damaged, mend that line: %s' % ' '.join(str(error).split())
            )
        return parser

    def find(self, target: str) -> ServiceEndPoint:
        """The endpoint of a name or of an address, with its pinned thumbprint if there is one.
        Raises UsageError.
        """
        ((_, endpoint),) = self._meant_by(target, with_patterns=False)
        return endpoint

    def choose(self, words: Iterable[str]) -> 'OrderedDict[str, ServiceEndPoint]':
        """The endpoints that the words of a command line mean, each once, by their names: names,
        `@group`, globs of names, addresses; and `!` ahead of one leaves those out. Raises
        UsageError.
        """
        chosen: 'OrderedDict[str, ServiceEndPoint]' = OrderedDict()
        words = [words] if isinstance(words, str) else list(words)
        for word in words:
            if not word.startswith('!'):
                for name, endpoint in self._meant_by(word):
                    chosen.setdefault(name, endpoint)
        for word in words:
            if word.startswith('!'):
                left_out = [name for name, _ in self._meant_by(word[1:]) if name in chosen]
                if not left_out:
                    raise UsageError('%s leaves out nothing: is it misspelt?' % printable(word))
                for name in left_out:
                    del chosen[name]
        if not chosen:
            raise UsageError('No target is left of: %s' % printable(' '.join(words)))
        return chosen

    def _meant_by(self, word: str, with_patterns: bool = True) -> List[Tuple[str, ServiceEndPoint]]:
        import fnmatch

        everyone = self.all()
        if word in everyone:
            return [(word, everyone[word])]
        if with_patterns and word.startswith('@'):
            names = [name for name in everyone if word[1:] in self.groups(name)]
            groups = sorted(set().union(*map(self.groups, everyone)))
            known = 'its groups are: %s' % ', '.join(groups) if groups else 'it has no groups'
        elif with_patterns and ('*' in word or '?' in word):
            names = [name for name in everyone if fnmatch.fnmatchcase(name, word)]
            known = 'its names are: %s' % ', '.join(everyone)
        else:
            uri = parse_target_uri(word)
            for name, endpoint in everyone.items():
                if endpoint.uri == uri:
                    return [(name, endpoint)]
            return [(word, ServiceEndPoint(uri))]
        if not names:
            raise UsageError(
                'No target of %s is meant by %s; %s'
                % (self.path, printable(word), printable(known))
            )
        return [(name, everyone[name]) for name in names]

    def groups(self, name: str) -> FrozenSet[str]:
        return frozenset(re.split(r'[\s,]+', self._sections[name].get('groups', ''))) - {''}

    def to_call(
        self,
        name: str,
        endpoint: ServiceEndPoint,
        proxy_of: Optional[Callable[[str], Optional[Proxy]]] = None,
        trust_command: str = 'tentacle.py trust',
    ) -> ServiceEndPoint:
        """A chosen target as it is called: through `proxy_of`, else the proxy of its section, else
        that of the environment. Raises UntrustedThumbprint when nothing is pinned, UsageError.
        """
        if endpoint.is_polling:
            return endpoint
        if endpoint.thumbprint is None:
            near = nearest(name, self.all())
            raise UntrustedThumbprint(
                '%s is not known here, so it is not called%s. See its thumbprint and trust it: '
                '%s %s' % (printable(name), near, trust_command, printable(name))
            )
        own = self._sections[name].get('proxy') if self._sections.has_section(name) else None
        if own is not None and proxy_of is None:
            try:
                return endpoint._replace(proxy=None if own == 'none' else parse_proxy(own))
            except UsageError as error:
                raise UsageError('The proxy of [%s] in %s: %s' % (name, self.path, error))
        return endpoint._replace(proxy=(proxy_of or proxy_of_environment)(endpoint.uri))

    def for_job(self, name: str, endpoint: ServiceEndPoint) -> ServiceEndPoint:
        """The endpoint of a job as it is called now: by the pin that its target has today. Raises
        UntrustedThumbprint when the target is none any more, UsageError.
        """
        now = self.find(name)
        if now.uri != endpoint.uri or endpoint.thumbprint is not None and now.thumbprint is None:
            raise UntrustedThumbprint(
                '%s is not the target any more that it was, %s: trust it again, or cancel the job'
                % (printable(name), endpoint.uri)
            )
        return self.to_call(name, endpoint._replace(thumbprint=now.thumbprint))

    def all(self) -> Dict[str, ServiceEndPoint]:
        """Every target by its name, in the order of the file. Raises TentacleError."""
        if self._all is None:
            self._all = {name: self._endpoint(name) for name in self._sections.sections()}
        return dict(self._all)

    def _line_of(self, name: str, key: str) -> int:
        """The number of the line that has a key of a section, or its head."""
        lines = self._text.split('\n')
        start = next(i for i, line in enumerate(lines) if line.strip() == '[%s]' % name)
        for i in range(start + 1, len(lines)):
            if lines[i].split('=')[0].strip().lower() == key:
                return i + 1
            if lines[i].startswith('['):
                break
        return start + 1

    def _endpoint(self, name: str) -> ServiceEndPoint:
        section = self._sections[name]
        for key in section:
            if key not in _TARGET_KEYS:
                raise TentacleError(
                    'The targets file %s is damaged: line %d has %s, and a target has %s'
                    % (self.path, self._line_of(name, key), printable(key), ', '.join(_TARGET_KEYS))
                )
        try:
            thumbprint = section.get('thumbprint')
            return ServiceEndPoint(
                parse_target_uri(section.get('uri') or name),
                thumbprint and parse_thumbprint(thumbprint),
            )
        except UsageError as error:
            broken = 'thumbprint' if 'is not a thumbprint' in str(error) else 'uri'
            raise TentacleError(
                'The target [%s] in %s is damaged, mend line %d: %s'
                % (printable(name), self.path, self._line_of(name, broken), error)
            )

    def pin(self, target: str, endpoint: ServiceEndPoint) -> None:
        """Keep an endpoint's thumbprint: in its section where it has one, else in a new one at the
        end.
        """
        names = [
            name for name in self._sections.sections() if self._endpoint(name).uri == endpoint.uri
        ]
        for name in names:
            self._text = _set_in_section(self._text, name, 'thumbprint', endpoint.thumbprint or '')
        if not names:
            name = target
            if '://' in target or '[' in target:
                name = endpoint.uri.split('/')[2] if endpoint.is_polling else ''
                name = name or '%s:%d' % endpoint.address
            self._text += '%s[%s]\nuri = %s\nthumbprint = %s\n' % (
                '' if not self._text else '\n' if self._text.endswith('\n') else '\n\n',
                name,
                endpoint.uri,
                endpoint.thumbprint,
            )
        write_private(os.path.realpath(self.path), self._text.encode())
        self._sections = self._parse()
        self._all = None


class TrustedPollers:
    """Who may poll our server: the thumbprints given for this run, and those of the polling targets
    as their file has them now; a subscription that stands there is for its thumbprint alone.
    """

    def __init__(self, home: str, given: Iterable[str] = ()):
        self._given = frozenset(given)

        def read() -> Dict[str, Optional[str]]:
            endpoints = Targets(home).all().values()
            return {entry.uri: entry.thumbprint for entry in endpoints if entry.is_polling}

        self._pinned = Watched(os.path.join(home, 'targets'), read)

    def __call__(self) -> FrozenSet[str]:
        return self._given.union(filter(None, self._pinned().values()))

    def pinned(self, subscription: str) -> Optional[str]:
        return self._pinned().get(subscription)


@contextlib.contextmanager
def sole_holder(home: str, name: str, text: str = '', seconds: float = 0) -> Iterator[str]:
    """Hold a lock of a home directory, which ends with its holder: '' with it, or, after so many
    seconds, what its holder said of itself. Raises TentacleError when the home can not be used.
    """
    with locked_folder(home):
        folder = os.path.join(home, 'agents')
        os.makedirs(folder, mode=0o700, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(os.path.join(folder, name), flags, 0o600)
    try:
        deadline = time.monotonic() + seconds
        while not _lock(descriptor):
            if time.monotonic() >= deadline:
                yield os.pread(descriptor, 1000, 0).decode('utf-8', 'replace') or 'another process'
                return
            time.sleep(0.1)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)
        yield ''
    finally:
        os.close(descriptor)


# ---- 19. Command line ----------------------------------------------------------------------------


def run(
    uri: str,
    script: str,
    thumbprint: str,
    home: Optional[str] = None,
    on_line: Optional[Callable[[OutputLine], None]] = None,
) -> ScriptResult:
    """Run a script on a listening tentacle and wait for its end.

    `uri` is `https://host:10933/` (or `host`, `host:port`), `thumbprint` that of the tentacle's
    certificate, and `home` where our own identity is (default as for the command line); the
    tentacle must trust it. `on_line` gets each line as it comes, in this thread. Raises
    TentacleError and what stands below it.

        import tentacle
        result = tentacle.run("https://host:10933/", "echo hi",
                              thumbprint="6D7A63503024C1F8CBD8B6EDCAFCD6C84726EFB3")
        print(result.exit_code, result.stdout)
    """
    endpoint = ServiceEndPoint(parse_target_uri(uri), parse_thumbprint(thumbprint))
    if endpoint.is_polling:
        raise UsageError('%s is a polling tentacle: Dispatcher.run calls those' % endpoint.uri)
    lines: List[OutputLine] = []

    def take(line: OutputLine) -> None:
        lines.append(line)
        if on_line is not None:
            on_line(line)

    with TentacleClient(endpoint, our_identity(read_settings(find_settings(home)))) as client:
        return ScriptResult(client.run_script(script, take), lines)


def relay_path(home: str) -> str:
    """The Unix socket of the `serve` of a home directory."""
    return os.path.join(home, 'serve.sock')


class Dispatcher:
    """Runs scripts on the tentacles that a home directory knows, as `exec` does: on listening ones,
    and through the `serve` of that home on polling ones. Any thread may call.

        dispatcher = tentacle.Dispatcher()
        for result in dispatcher.run(['@web', '!web-3'], 'uptime'):
            print(result.target, result.state, result.exit_code)
    """

    def __init__(self, home: Optional[str] = None, limits: Limits = LIMITS):
        """`home`: default as for the command line. Raises TentacleError."""
        self._limits = limits
        settings = read_settings(find_settings(home))
        self.home = settings.home
        self.identity = our_identity(settings)

    def client(self, endpoint: ServiceEndPoint) -> Any:
        """A client for a tentacle, to be closed by its user. Raises NotDelivered."""
        if not endpoint.is_polling:
            return TentacleClient(endpoint, self.identity, self._limits)
        if not os.path.exists(relay_path(self.home)):
            raise NotDelivered(
                '%s is a polling tentacle, and no server runs that it could poll: start '
                '`tentacle.py serve` of %s, or give exec --listen-for-polling'
                % (endpoint.uri, self.home)
            )
        return RelayedClient(relay_path(self.home), endpoint, self.identity, self._limits)

    def run(
        self,
        targets: Iterable[str],
        script: str,
        files: Sequence[ScriptFile] = (),
        on_line: Callable[[str, OutputLine], None] = lambda target, line: None,
        parallel: int = 32,
        rolling: Optional[int] = None,
        max_fail: Optional[int] = None,
    ) -> Iterator[TargetResult]:
        """Run a script on targets (names, `@group`, globs, addresses, `!` to leave out), and give a
        result for each as it comes; who stops asking for more has the rest cancelled.

        `on_line` gets each line with its target's name, in threads of ours. `parallel`, `rolling`
        and `max_fail` as for FanOut. Raises UsageError for the words, before anything is begun.
        """
        known = Targets(self.home)
        chosen = known.choose(targets)

        def run_on(name: str) -> int:
            with self.client(known.to_call(name, chosen[name])) as client:
                client.capabilities()
                fan_out.begins(name)
                take = lambda line: on_line(name, line)
                return client.run_script(script, take, files=files, stop=fan_out.stop)

        fan_out = FanOut(run_on, parallel, rolling, max_fail, self._limits)
        return fan_out.results(list(chosen))

    # -- jobs, by the `serve` of the home

    def ask_serve(self, method: str, *params: Any) -> Any:
        """Call the `serve` of the home itself. Raises NotDelivered where none runs."""
        endpoint = ServiceEndPoint('poll://relay/')
        with RelayedClient(relay_path(self.home), endpoint, self.identity, self._limits) as client:
            return client.call(RELAY_SERVICE, method, *params)

    def submit(
        self,
        targets: Iterable[str],
        script: str,
        expires: Optional[float] = None,
        retry_lost: bool = False,
    ) -> Dict[str, int]:
        """Leave a script to `serve` as a job for each target, connected or not: their numbers by
        the targets' names, and they are on the disk.

        `expires`: seconds since 1970, from which on it is not begun. `retry_lost`: it is begun anew
        when its tentacle lost it. Raises UsageError, UntrustedThumbprint, NotDelivered.
        """
        known = Targets(self.home)
        called = [(name, known.to_call(name, end)) for name, end in known.choose(targets).items()]
        moment = None if expires is None else Int64(int(expires * 1000))
        listed = [[name, end.uri, end.thumbprint] for name, end in called]
        numbers = self.ask_serve('AddJobs', listed, script, moment, retry_lost)
        return {name: number for (name, _), number in zip(called, numbers)}

    def cancel(self, number: int) -> str:
        """Have a job cancelled; the state that it was in. Raises UsageError, NotDelivered."""
        return self.ask_serve('CancelJob', Int64(number))

    @contextlib.contextmanager
    def job_store(self) -> Iterator[JobStore]:
        """The jobs, to read, with `serve` or without it. Raises TentacleError."""
        if not os.path.exists(os.path.join(self.home, 'jobs.db')):
            raise TentacleError(
                'There are no jobs in %s: `exec --detach` gives them to a `serve`' % self.home
            )
        store = JobStore(self.home, read_only=True)
        try:
            yield store
        finally:
            store.close()


class Command(NamedTuple):
    """A verb of the command line: its help, its options and what it does stand together.

    Those with `is_original` are the words of the original Tentacle: their options are `--name
    value`, `--name=value` or `/name=value`, in any case, and a usage error has exit code 1.
    """

    name: str
    help: str
    example: str
    options: Tuple[Tuple[Tuple[str, ...], Dict[str, Any]], ...]
    function: Callable[[Any], int]
    words: str  # what may follow after --, '' = nothing may
    is_original: bool = False
    aliases: Tuple[str, ...] = ()
    has_instance: bool = False  # it works on the settings of one: --instance, --config, a log file


COMMANDS: 'OrderedDict[str, Command]' = OrderedDict()


def _option(*names: str, **settings: Any) -> Tuple[Tuple[str, ...], Dict[str, Any]]:
    """An argument as `argparse` takes it."""
    return names, settings


def _flag(name: str, help: str) -> Tuple[Tuple[str, ...], Dict[str, Any]]:
    return _option(name, action='store_true', help=help)


def _value(name: str, help: str, *more: str, **settings: Any) -> Any:
    """An option with a value, which the original's help shows as =VALUE."""
    return _option(name, *more, metavar='VALUE', help=help, **settings)


def _list(name: str, help: str) -> Any:
    """The same, which may be repeated."""
    return _value(name, help, action='append', default=[])


def _command(
    name: str, help: str, example: str, *options: Any, words: str = ''
) -> Callable[[Callable[[Any], int]], Callable[[Any], int]]:
    """Declare a verb: the function below it gets the parsed arguments and gives the exit code."""

    def register(function: Callable[[Any], int]) -> Callable[[Any], int]:
        COMMANDS[name] = Command(name, help, example, options, function, words)
        return function

    return register


def _original(
    name: str, help: str, *options: Any, aliases: Tuple[str, ...] = (), has_instance: bool = True
) -> Callable[[Callable[[Any], int]], Callable[[Any], int]]:
    """Declare one of the original's commands."""

    def register(function: Callable[[Any], int]) -> Callable[[Any], int]:
        COMMANDS[name] = Command(name, help, '', options, function, '', True, aliases, has_instance)
        return function

    return register


#: What a command says also goes to its instance's log file, where it has one.
told_logger = logging.getLogger('tentacle.told')
told_logger.propagate = False
told_logger.addHandler(logging.NullHandler())


def say(text: str) -> None:
    """A result, on stdout, at once."""
    print(text, flush=True)
    told_logger.info('%s', text)


def _write_json(facts: Any) -> None:
    """As the original writes it: indented, without a line's end."""
    sys.stdout.write(json.dumps(facts, indent=2, ensure_ascii=False))
    sys.stdout.flush()


_FORMAT_OPTION = _value(
    '--format', 'The format of the output (text,json). Defaults to text.', default='text'
)


def _wants_json(arguments: Any) -> bool:
    """Raises UsageError."""
    if arguments.format.lower() not in ('text', 'json'):
        raise UsageError(
            "The format '%s' is not supported. Try text or json." % printable(arguments.format)
        )
    return arguments.format.lower() == 'json'


def _complain(text: str) -> None:
    """What went wrong, on stderr, as one line."""
    print('tentacle.py: ' + printable(text, 2000), file=sys.stderr, flush=True)
    told_logger.error('%s', printable(text, 2000))


def _settings_path(arguments: Any) -> str:
    """The settings file that a command works on. Raises TentacleError."""
    if getattr(arguments, 'config', None) is not None:
        path = os.path.abspath(arguments.config)
        if not os.path.isfile(path):
            raise TentacleError(
                'There is no settings file %s: create-instance --config makes one' % path
            )
        return path
    if getattr(arguments, 'instance', None) is not None:
        return find_instance(arguments.instance).settings_path
    path = find_settings(arguments.home)
    is_vague = hasattr(arguments, 'instance') and not (
        arguments.home or os.environ.get('TENTACLE_HOME') or os.path.exists(path)
    )
    if is_vague and len(instances()) > 1:
        raise UsageError(
            'There are several instances on this machine: which one? --instance NAME. Available '
            'instances: %s' % ', '.join(entry.name for entry in instances())
        )
    return path


def _settings(arguments: Any) -> Settings:
    return read_settings(_settings_path(arguments))


def _program(arguments: Any, command: str) -> str:
    """A command line of ours for a person to copy, in any shell."""
    import shlex

    verb, *rest = command.split()
    words = ['python3', os.path.abspath(__file__), verb]
    home = arguments.home or os.environ.get('TENTACLE_HOME')
    if getattr(arguments, 'config', None) is not None:
        words += ['--config', os.path.abspath(arguments.config)]
    elif getattr(arguments, 'instance', None) is not None:
        words += ['--instance', arguments.instance]
    elif home and COMMANDS[verb].is_original:
        words += ['--config', find_settings(home)]  # --home would set it in a default instance
    elif home:
        words += ['--home', os.path.abspath(home)]
    return ' '.join(shlex.quote(word) for word in words + rest)


def _port(text: str) -> int:
    if not re.match(r'[0-9]{1,5}\Z', text) or int(text) > 65535:
        raise UsageError('%s is not a port: 0 to 65535 expected (0 = a free one)' % printable(text))
    return int(text)


def _files_root(text: Optional[str]) -> Optional[str]:
    """The folder of --files-root as an absolute path. Raises UsageError."""
    if not text:
        return text
    if not os.path.isdir(text):
        raise UsageError('--files-root %s: there is no such folder' % printable(text))
    return os.path.abspath(text)


class SignalWaiter:
    """Catches signals from its making on; `wait` sleeps until one comes. The main thread alone.

    The handler does nothing: one that sets an Event can meet the lock that its own thread holds.
    """

    def __init__(self, *signals: int):
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._signals = signals
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in signals:
            signal.signal(number, lambda number, frame: None)

    def wait(self) -> int:
        """The number of the signal that came, 0 for `wake`."""
        return self._reader.recv(1)[0]

    def has_come(self, *numbers: int) -> bool:
        """Whether one of these came since. The last question but `close`."""
        self._reader.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            return bool(set(self._reader.recv(4096)).intersection(numbers))
        return False

    def wake(self) -> None:
        """End a wait. Any thread may call."""
        self._writer.send(b'\0')

    def close(self) -> None:
        """Signals that come from here on change nothing: we are stopping already."""
        for number in self._signals:
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        self._reader.close()
        self._writer.close()


def _stop_signals() -> List[int]:
    """What ends a resident verb: also the end of its terminal, but under nohup."""
    ends = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        ends.append(signal.SIGHUP)
    return ends


_TRUST_OPTION = _option(
    '--trust',
    metavar='THUMBPRINT',
    action='append',
    default=[],
    help='also trust this certificate, for this run; may be repeated',
)
_FILES_ROOT_OPTION = _option(
    '--files-root',
    metavar='DIR',
    help='no file outside this folder is uploaded or downloaded (default: as configured)',
)
_PROXY_OPTIONS = (
    _option(
        '--proxy',
        metavar='URL',
        help='go through this HTTP proxy, http://[USER[:PASSWORD]@]HOST:PORT; none = through none '
        '(default: $HTTPS_PROXY or $ALL_PROXY, minus $NO_PROXY)',
    ),
    _option(
        '--proxy-password-file',
        metavar='FILE',
        help='the password of --proxy is the first line of this file',
    ),
)


def _proxy_chooser(
    arguments: Any, default: Callable[[str], Optional[Proxy]] = proxy_of_environment
) -> Callable[[str], Optional[Proxy]]:
    """What gives the proxy to an https URI. Raises UsageError."""
    password = None
    if arguments.proxy_password_file is not None:
        try:
            with open(arguments.proxy_password_file, encoding='utf-8') as file:
                password = file.readline().rstrip('\r\n')
        except (OSError, ValueError) as error:
            raise UsageError('The file of --proxy-password-file can not be read: %s' % error)
    if arguments.proxy is None:
        if password is not None:
            raise UsageError('--proxy-password-file needs --proxy http://USER@HOST:PORT')
        return default
    chosen = None if arguments.proxy == 'none' else parse_proxy(arguments.proxy, password)
    if password is not None and not (chosen and chosen.user):
        raise UsageError('--proxy-password-file needs --proxy http://USER@HOST:PORT')
    return lambda uri: chosen


# -- the log file of an instance

_LOG_NAME = os.path.join('Logs', 'OctopusTentacle.txt')
_AUDIT_NAME = os.path.join('Logs', 'audit.jsonl')
_LEVEL_NAMES = {'WARNING': 'WARN', 'CRITICAL': 'FATAL'}


class _LogFormatter(logging.Formatter):
    """The original's layout: time, process, thread, level, text."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(record.created))
        fraction = int(record.created % 1 * 10000)
        thread = getattr(threading, 'get_native_id', lambda: 0)()
        level = _LEVEL_NAMES.get(record.levelname, record.levelname)
        lead = '%s.%04d  %5d  %5d %-5s  ' % (moment, fraction, os.getpid(), thread, level)
        text = lead + record.getMessage()
        return text + ('\n' + self.formatException(record.exc_info) if record.exc_info else '')


class _LogFile(logging.FileHandler):
    """A log file that its owner alone may read; where it rotates, NAME.0.EXT is the newest of the
    old ones. (`logging.handlers` would cost an idle agent a megabyte.) Raises OSError when it is
    made, and nothing from then on: a full disk ends no call.
    """

    def __init__(self, path: str, rotates: bool):
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        self._rotates = rotates
        self._has_failed = False
        super().__init__(path, encoding='utf-8')

    def _open(self) -> Any:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        return open(os.open(self.baseFilename, flags, 0o600), 'a', encoding='utf-8')

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        with contextlib.suppress(OSError, ValueError):
            if self._rotates and self.stream.tell() > LIMITS.log_file:
                self._rotate()

    def _rotate(self) -> None:
        base, extension = os.path.splitext(self.baseFilename)
        names = ['%s.%d%s' % (base, i, extension) for i in range(LIMITS.old_logs)]
        for older, newer in reversed(list(zip(names[1:], names))):
            with contextlib.suppress(FileNotFoundError):
                os.replace(newer, older)
        os.replace(self.baseFilename, names[0])
        self.stream.close()
        self.stream = self._open()

    def handleError(self, record: logging.LogRecord) -> None:
        """Says it once, where it still can be said."""
        if not self._has_failed:
            self._has_failed = True
            reason = sys.exc_info()[1]
            print(
                'tentacle.py: %s can not be written: %s' % (self.baseFilename, reason),
                file=sys.stderr,
                flush=True,
            )


def _operating_system() -> str:
    with contextlib.suppress(OSError), open('/etc/os-release', encoding='utf-8') as file:
        for line in file:
            if line.startswith('PRETTY_NAME='):
                return line.partition('=')[2].strip().strip('"\'')
    return ' '.join(os.uname()[0:3:2])


#: Options whose values are secrets.
_SECRET_OPTIONS = frozenset(
    'apikey bearertoken key password p pw pfx-password proxypassword'.split()
)


def _shown_words(words: Sequence[str]) -> str:
    """A command line for a log, without its secrets."""
    shown, is_secret = [], False
    for word in words:
        match = re.match(r'((?:--|-|/)([\w-]+))([=:].*)?\Z', word, re.S)
        names_secret = bool(match) and match.group(2).lower() in _SECRET_OPTIONS  # type: ignore
        if is_secret:
            word = '***'
        elif names_secret and match and match.group(3):
            word = match.group(1) + '=***'
        shown.append(re.sub(r'(://[^/\s:@]*:)[^/\s]*@', r'\1***@', word))
        is_secret = names_secret and not (match and match.group(3)) and not is_secret
    return printable(' '.join(shown), 2000)


def _instance_name(arguments: Any, settings: Settings) -> str:
    """The name of the instance whose settings these are; the default one's where it has none."""
    given = getattr(arguments, 'instance', None)
    names = [entry.name for entry in instances_of(settings.path)]
    if given in names or not names:
        return given or DEFAULT_INSTANCE
    return names[0]


def _current_folder() -> str:
    try:
        return os.getcwd()
    except OSError:
        return 'deleted'


def _start_up_facts(arguments: Any, settings: Settings) -> List[str]:
    """What the log file says first."""
    bits = struct.calcsize('P') * 8
    return [
        'Tentacle version %s (tentacle.py %s) instance %s'
        % (TENTACLE_VERSION, __version__, _instance_name(arguments, settings)),
        'Environment Information:',
        '  OperatingSystem: ' + _operating_system(),
        '  OsBitVersion: ' + ('x64' if bits == 64 else 'x86'),
        '  Is64BitProcess: %s' % (bits == 64),
        '  CurrentUser: ' + user_name(),
        '  MachineName: ' + socket.gethostname(),
        '  ProcessorCount: %d' % (os.cpu_count() or 1),
        '  CurrentDirectory: ' + printable(_current_folder()),
        '  TempDirectory: ' + os.path.join(os.environ.get('TMPDIR') or '/tmp', ''),
        '  HostProcessName: tentacle.py',
        '  PID: %d' % os.getpid(),
        'CommandLine: ' + _shown_words(sys.argv),
    ]


def _logged_settings(arguments: Any, rotates: bool = False) -> Settings:
    """The settings of an original's command, which is told of in their instance's log file from
    here on. Raises TentacleError.
    """
    settings = _settings(arguments)
    try:
        if os.geteuid() == 0 and os.stat(settings.home).st_uid != 0 and not rotates:
            return settings  # root writes nothing in a folder where another one may have laid links
        handler = _LogFile(os.path.join(settings.home, _LOG_NAME), rotates)
    except OSError as error:
        logger.debug('There is no log file: %s', error)
        return settings
    handler.setFormatter(_LogFormatter())
    for target in (logger, told_logger):
        target.addHandler(handler)
    told_logger.setLevel(logging.INFO)
    for text in _start_up_facts(arguments, settings):
        told_logger.info('%s', text)
    return settings


def _start_audit(settings: Settings) -> None:
    """From here on `audit` writes. Raises TentacleError: who asked for a record gets it."""
    path = os.path.join(settings.home, _AUDIT_NAME)
    try:
        handler = _LogFile(path, rotates=True)
    except OSError as error:
        raise TentacleError('The audit log %s can not be written: %s' % (path, error.strerror))
    handler.setFormatter(logging.Formatter('%(message)s'))
    audit_logger.addHandler(handler)
    audit_logger.setLevel(logging.INFO)


def _allow_many_descriptors() -> Optional[int]:
    """A connection takes one, and the usual soft limit is 1,024: have the hard limit; the soft one
    that we were given.
    """
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return soft if soft > 0 else None


def _limit_descriptors(soft: Optional[int]) -> None:
    import resource

    if soft is not None:
        with contextlib.suppress(ValueError, OSError):
            hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _agent_services(arguments: Any, settings: Settings) -> AgentServices:
    """Raises TentacleError when the home can not be used."""
    _start_audit(settings)
    instance = _instance_name(arguments, settings)
    root = _files_root(getattr(arguments, 'files_root', None)) or settings.files_root or None
    try:
        return AgentServices(
            settings.home,
            lambda: script_environment(settings, instance),
            root,
            verb=arguments.command,
            arguments=_shown_words(sys.argv[1:]),
            descriptors=_allow_many_descriptors(),
        )
    except OSError as error:
        raise TentacleError(
            '%s can not be used: %s. Choose another folder with --home DIR or $TENTACLE_HOME'
            % (settings.home, error.strerror)
        )


def _say_trusted(arguments: Any, identity: Identity, trusted: TrustedThumbprints) -> None:
    logger.info('tentacle.py %s, our thumbprint is %s', __version__, identity.thumbprint)
    pinned = trusted()
    for thumbprint in sorted(pinned):
        say('Agent will trust Octopus Servers with the thumbprint: ' + thumbprint)
    if not pinned:
        say(
            'Agent trusts no Octopus Server yet, so it will refuse every connection. '
            'To trust one: %s THUMBPRINT' % _program(arguments, 'configure --trust')
        )


def _listener(
    arguments: Any,
    settings: Settings,
    services: AgentServices,
    identity: Identity,
    trusted: TrustedThumbprints,
    port: int,
    signals: SignalWaiter,
) -> ListeningTentacle:
    trust_command = _program(arguments, 'configure --trust')
    address = settings.listen_address
    return ListeningTentacle(
        services, identity, trusted, address, port, trust_command, on_failure=signals.wake
    )


def _start_listening(agent: ListeningTentacle) -> None:
    agent.start()
    say('listen://%s/ ... Listener started' % agent.address)
    say('Agent listening on: %s' % agent.address)


class _SettingsWatch:
    """Looks every two seconds whether the settings have changed: has the connections of those end
    who are trusted no more, and says what counts after a restart alone.
    """

    def __init__(self, trusted: TrustedThumbprints, drop_untrusted: Callable[[], None]):
        self._trusted = trusted
        self._drop_untrusted = drop_untrusted
        self._known = trusted.settings()
        self._stopped = threading.Event()
        start_thread('settings', self._run)

    def _run(self) -> None:
        pinned = self._trusted()
        while not self._stopped.wait(LIMITS.settings_look):
            now = self._trusted()
            if now != pinned:
                added, removed = ', '.join(sorted(now - pinned)), ', '.join(sorted(pinned - now))
                logger.info('Trusted from now on: %s; no more: %s', added or '-', removed or '-')
                audit('trust-changed', added=sorted(now - pinned), removed=sorted(pinned - now))
                pinned = now
                self._drop_untrusted()
            before, self._known = self._known, self._trusted.settings()
            if self._known is not before:
                self._tell(before, self._known)

    def _tell(self, before: Settings, now: Settings) -> None:
        old, new = dict(before.values), dict(now.values)
        if before.polled() == now.polled():
            old[KEY_TRUSTED] = new[KEY_TRUSTED] = ''
        changed = [key for key in {**old, **new} if old.get(key, '') != new.get(key, '')]
        if changed:
            logger.warning(
                'The settings have changed, and a restart takes that over: %s',
                printable(', '.join(sorted(changed)), 2000),
            )

    def stop(self) -> None:
        self._stopped.set()


def _notify(state: str) -> None:
    """Tell systemd how we are, where it asked for that (sd_notify(3))."""
    address = os.environ.get('NOTIFY_SOCKET', '')
    if address[:1] in ('/', '@'):
        with contextlib.suppress(OSError), socket.socket(
            socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
        ) as sock:
            sock.sendto(state.encode(), address.replace('@', '\0', 1))


@contextlib.contextmanager
def _sole_listener(arguments: Any, settings: Settings) -> Iterator[None]:
    """Be the one agent that listens for a home. Raises TentacleError where another one does, and
    does not end soon.
    """
    text = '%s, process %d, since %s' % (
        arguments.command,
        os.getpid(),
        iso_time(int(time.time() * 1000)),
    )
    with sole_holder(settings.home, 'listening', text, LIMITS.predecessor) as holder:
        if holder:
            raise TentacleError(
                'Another agent listens for %s already: %s. Use that one, stop it, or give this one '
                'a home of its own with --home DIR' % (settings.home, holder)
            )
        yield


def _file_is_sound() -> bool:
    """Whether the file on the disk, which may be another version by now, runs here."""
    import subprocess

    command = [sys.executable or '/proc/self/exe', '-I', os.path.abspath(__file__), 'version']
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        logger.error('SIGUSR2: the file on the disk is not taken: %s', error)
        return False
    said = done.stdout.decode('utf-8', 'replace').strip().rpartition('\n')[2]
    is_sound = done.returncode == 0 and bool(re.match(r'[0-9]+\.[0-9]+', said))
    if not is_sound:
        text = 'SIGUSR2: the file on the disk is not taken, `version` ends with code %d: %s'
        logger.error(text, done.returncode, printable(said or 'it says nothing'))
    return is_sound


def _await_end(signals: SignalWaiter, pollers: Sequence[PollingTentacle]) -> int:
    """The signal that is to end this agent, 0 when its listener has ended."""
    while True:
        number = signals.wait()
        if number == signal.SIGHUP and pollers:
            logger.info('SIGHUP: dialling now')
            for agent in pollers:
                agent.dial_now()
        elif number != signal.SIGUSR2 or _file_is_sound():
            return number


def _stay(
    services: AgentServices,
    trusted: TrustedThumbprints,
    signals: SignalWaiter,
    listener: Optional[ListeningTentacle],
    pollers: Sequence[PollingTentacle],
) -> int:
    """Be a tentacle until SIGTERM or Ctrl-C; SIGHUP has the pollers dial at once, SIGUSR2 has the
    process start anew from the file on the disk.
    """
    agents = ([listener] if listener is not None else []) + list(pollers)

    def drop_untrusted() -> None:
        for agent in agents:
            agent.drop_untrusted()

    services.start()
    watch = _SettingsWatch(trusted, drop_untrusted)
    if listener is not None:
        _start_listening(listener)
    if pollers:
        say('Starting %d polling connections' % sum(len(agent.servers) for agent in pollers))
    for agent in pollers:
        agent.start()
    _notify('READY=1')
    audit('agent-started', version=__version__, trusted=sorted(trusted()))
    number = _await_end(signals, pollers)
    starts_anew = number == signal.SIGUSR2
    logger.info('Stopping: %s', signal.Signals(number).name if number else 'the listener ended')
    if not starts_anew:
        _notify('STOPPING=1')
    audit('agent-stopped')
    watch.stop()
    if not starts_anew:
        signals.close()
    for agent in agents:
        agent.stop()
    services.stop()
    if starts_anew and not signals.has_come(signal.SIGTERM, signal.SIGINT):
        _limit_descriptors(services.descriptors)
        program = sys.executable or '/proc/self/exe'
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # until the new one listens to it
        os.execv(program, [program, '-I', os.path.abspath(__file__)] + sys.argv[1:])
    return 0 if number else 1


def _resident_signals(polls: bool) -> SignalWaiter:
    return SignalWaiter(*{*_stop_signals(), signal.SIGUSR2, *([signal.SIGHUP] if polls else [])})


@_command(
    'listen',
    'be a listening tentacle, until SIGTERM or Ctrl-C',
    'tentacle.py listen --trust 6D7A63503024C1F8CBD8B6EDCAFCD6C84726EFB3',
    _option(
        '--port',
        metavar='N',
        help='port to listen on, 0 = a free one (default: as configured, else 10933)',
    ),
    _TRUST_OPTION,
    _FILES_ROOT_OPTION,
)
def _listen(arguments: Any) -> int:
    given = [parse_thumbprint(text) for text in arguments.trust]
    settings = _settings(arguments)
    port = settings.port if arguments.port is None else _port(arguments.port)
    identity = our_identity(settings)
    trusted = TrustedThumbprints(settings.path, given)
    with _sole_listener(arguments, settings):
        services = _agent_services(arguments, settings)
        signals = _resident_signals(polls=False)
        agent = _listener(arguments, settings, services, identity, trusted, port, signals)
        _say_trusted(arguments, identity, trusted)
        return _stay(services, trusted, signals, agent, [])


_BUSY = 75  # EX_TEMPFAIL: another one of the same home is still at it


def _number(option: str, text: str, least: int, most: int) -> int:
    if not re.match(r'[0-9]{1,10}\Z', text) or not least <= int(text) <= most:
        raise UsageError(
            '%s %s: a number from %d to %d expected' % (option, printable(text), least, most)
        )
    return int(text)


def _poll_once(agents: Sequence[PollingTentacle], services: AgentServices, max_time: float) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    services.start()
    reached: List[bool] = []

    def run(agent: PollingTentacle) -> None:
        reached.append(agent.run_once(max_time))

    try:
        for thread in [start_thread('once', run, agent) for agent in agents]:
            thread.join()
    finally:
        for agent in agents:
            agent.stop()
        services.stop()
    return 0 if any(reached) else 1


def _say_polled(agent: PollingTentacle, thumbprint: str) -> None:
    for uri in sorted(set(agent.servers)):
        say(
            'Agent will poll Octopus Server at %s for subscription %s expecting thumbprint %s'
            % (uri, agent.subscription, thumbprint)
        )


def _configured_pollers(
    arguments: Any,
    settings: Settings,
    services: AgentServices,
    identity: Identity,
    trusted: TrustedThumbprints,
    connections: int,
    proxy_of: Callable[[str], Optional[Proxy]],
) -> List[PollingTentacle]:
    """One for each server that the settings have to be polled, with its own thumbprint. Raises
    TentacleError.
    """
    agents = []
    for server in settings.polled():
        if not (server.address and server.subscription):
            logger.error('%s is not polled: it has no address, or no subscription', server)
            continue

        def pinned(known: TrustedServer = server) -> FrozenSet[str]:
            """Who this server is by the settings as they are now."""
            place = (known.address, known.subscription)
            polled = trusted.settings().polled()
            return frozenset(
                entry.thumbprint for entry in polled if (entry.address, entry.subscription) == place
            )

        try:
            agent = PollingTentacle(
                services,
                identity,
                pinned,
                [server.address],
                server.subscription,
                connections,
                proxy_of,
                _program(arguments, 'configure --trust'),
            )
        except UsageError as error:
            raise TentacleError('%s in %s: %s' % (KEY_TRUSTED, settings.path, error))
        _say_polled(agent, server.thumbprint)
        agents.append(agent)
    return agents


@_command(
    'poll',
    'be a polling tentacle, that dials its servers; resident, or from cron with --once',
    'tentacle.py poll https://server:10943/ --trust 6D7A63503024C1F8CBD8B6EDCAFCD6C84726EFB3\n'
    '  * * * * * cd /opt && python3 -m tentacle poll https://server:10943/ --once  (in a crontab)',
    _option(
        'servers',
        metavar='URL',
        nargs='*',
        help='https://HOST[:10943]/, one for each node (default: those of the settings)',
    ),
    _TRUST_OPTION,
    _option(
        '--subscription',
        metavar='poll://NAME/',
        help='the queue to poll (default: one that is made once, and kept)',
    ),
    _option(
        '--connections', metavar='N', help='to each server, 1 to 512 (default: as configured, or 1)'
    ),
    _option(
        '--once',
        action='store_true',
        help='do the work there is and leave: exit code 0, 1 when no server could be reached, 75 '
        'when another one of this home is still at it',
    ),
    _option(
        '--max-time',
        metavar='SECONDS',
        help='with --once: leave after this time, or with the call that is under way then; scripts '
        'go on, and the next run has them again',
    ),
    _option('--listen', metavar='PORT', help='be a listening tentacle as well, on this port'),
    _FILES_ROOT_OPTION,
    *_PROXY_OPTIONS,
)
def _poll(arguments: Any) -> int:
    given = [parse_thumbprint(text) for text in arguments.trust]
    connections = None
    if arguments.connections is not None:
        connections = _number('--connections', arguments.connections, 1, 512)
    max_time = float('inf')
    if arguments.max_time is not None:
        max_time = _number('--max-time', arguments.max_time, 1, 10**9)
    if arguments.max_time is not None and not arguments.once:
        raise UsageError('--max-time is for --once')
    if arguments.once and arguments.listen is not None:
        raise UsageError('--once leaves when its work is done, so it can not --listen')
    for url in arguments.servers:
        if re.match(r'(?!https://)\w+://', url):
            raise UsageError('%s is no server: https://HOST:PORT/ expected' % printable(url))
    settings = _settings(arguments)
    proxy_of = _proxy_chooser(arguments, settings.polling_proxy.proxy_of)
    if not (arguments.servers or settings.polled()):
        raise UsageError('which server? https://HOST:PORT/ expected, or one in the settings')
    connections = connections or settings.polling_connections
    identity = our_identity(settings)
    trusted = TrustedThumbprints(settings.path, given)
    with contextlib.ExitStack() as stack:
        if arguments.once and stack.enter_context(sole_holder(settings.home, 'once')):
            _complain(
                'another `tentacle.py poll --once` of %s is still at it; a host may have several '
                'with --home DIR' % settings.home
            )
            return _BUSY
        if arguments.listen is not None:
            stack.enter_context(_sole_listener(arguments, settings))
        subscription = arguments.subscription and parse_subscription(arguments.subscription)
        services = _agent_services(arguments, settings)
        listener, signals = None, None
        if not arguments.once:
            signals = _resident_signals(polls=True)
        if arguments.listen is not None and signals is not None:
            port = _port(arguments.listen)
            listener = _listener(arguments, settings, services, identity, trusted, port, signals)
        if not arguments.once:
            _say_trusted(arguments, identity, trusted)
        if arguments.servers:
            agents = [
                PollingTentacle(
                    services,
                    identity,
                    trusted,
                    arguments.servers,
                    subscription or our_subscription(settings),
                    connections,
                    proxy_of,
                    _program(arguments, 'configure --trust'),
                )
            ]
            if not arguments.once:
                _say_polled(agents[0], ' or '.join(sorted(trusted())) or 'none yet')
        else:
            agents = _configured_pollers(
                arguments, settings, services, identity, trusted, connections, proxy_of
            )
        if signals is None:
            return _poll_once(agents, services, max_time)
        return _stay(services, trusted, signals, listener, agents)


@_original(
    'agent',
    'Be a tentacle in the foreground, as the settings have it: listen, and poll',
    _value('--wait', 'Milliseconds to wait first'),
    _FILES_ROOT_OPTION,
    aliases=('run',),
)
def _agent(arguments: Any) -> int:
    if arguments.wait:
        time.sleep(_number('--wait', arguments.wait, 0, 10**8) / 1000)
    settings = _logged_settings(arguments, rotates=True)
    if not os.path.exists(settings.path):
        raise TentacleError(
            'There are no settings %s yet: create-instance makes them' % settings.path
        )
    identity = our_identity(settings)
    trusted = TrustedThumbprints(settings.path)
    with contextlib.ExitStack() as stack:
        if not settings.no_listen:
            stack.enter_context(_sole_listener(arguments, settings))
        services = _agent_services(arguments, settings)
        signals = _resident_signals(polls=bool(settings.polled()))
        listener, port = None, settings.port
        if not settings.no_listen:
            listener = _listener(arguments, settings, services, identity, trusted, port, signals)
        _say_trusted(arguments, identity, trusted)
        agents = _configured_pollers(
            arguments,
            settings,
            services,
            identity,
            trusted,
            settings.polling_connections,
            settings.polling_proxy.proxy_of,
        )
        if listener is None:
            say('Agent will not listen on any TCP ports')
        return _stay(services, trusted, signals, listener, agents)


def _polling_server(
    arguments: Any, settings: Settings, identity: Identity, given: List[str], port: int
) -> PollingServer:
    trusted = TrustedPollers(settings.home, given)
    trust_command = _program(arguments, 'trust') + ' poll://SUBSCRIPTION/'
    return PollingServer(identity, trusted, '', port, trusted.pinned, trust_command=trust_command)


@_command(
    'serve',
    'let polling tentacles come here, and hand them the calls of exec, upload and download',
    'tentacle.py serve --trust 6D7A63503024C1F8CBD8B6EDCAFCD6C84726EFB3',
    _option('--port', metavar='N', help='port to listen on, 0 = a free one (default: 10943)'),
    _TRUST_OPTION,
)
def _serve(arguments: Any) -> int:
    given = [parse_thumbprint(text) for text in arguments.trust]
    port = POLLING_PORT if arguments.port is None else _port(arguments.port)
    settings = _settings(arguments)
    identity = our_identity(settings)
    with sole_holder(settings.home, 'serve') as other:
        if other:
            raise TentacleError(
                'Another `tentacle.py serve` of %s runs already: use that one, or stop it'
                % settings.home
            )
        _allow_many_descriptors()
        server = _polling_server(arguments, settings, identity, given, port)
        store = JobStore(settings.home)
        clients: Dict[ServiceEndPoint, Any] = {}  # a pin or a proxy that changed makes another
        impatient = LIMITS._replace(connect=20.0, handshake=20.0)  # a job is tried again
        targets = Watched(Targets(settings.home).path, lambda: Targets(settings.home))

        def client_of(target: str, endpoint: ServiceEndPoint) -> Any:
            called = targets().for_job(target, endpoint)
            if endpoint.is_polling:
                return server.client(called)
            called = called._replace(queue_timeout=0.0)
            return clients.setdefault(called, TentacleClient(called, identity, impatient))

        keep = settings.job_days * 86400.0, settings.job_count
        jobs = JobRunner(store, client_of, server.is_connected, keep)
        server.on_admitted = jobs.look
        relay = Relay(relay_path(settings.home), server, jobs=jobs)
        signals = SignalWaiter(*_stop_signals())
        logger.info('tentacle.py %s, our thumbprint is %s', __version__, identity.thumbprint)
        server.start()
        jobs.start()
        relay.start()
        say('Server for polling tentacles on: %s' % server.address)
        logger.info('Stopping: %s', signal.Signals(signals.wait()).name)
        signals.close()
        relay.stop()
        jobs.stop()
        server.stop()
        for client in clients.values():
            client.close()
        jobs.join()
        store.close()
    return 0


def _ago(seconds: float) -> str:
    for unit, size in (('d', 86400), ('h', 3600), ('min', 60)):
        if seconds >= size:
            return '%d %s' % (seconds // size, unit)
    return '%d s' % seconds


_JSON_OPTION = _option('--json', action='store_true', help='events on stdout, one object a line')
_PARALLEL_OPTION = _option(
    '-p',
    '--parallel',
    metavar='N',
    default='32',
    help='on so many targets at once (default: 32)',
)
_TARGETS_OPTIONS = (
    _option(
        'targets',
        metavar='TARGET',
        nargs='*',
        help='a name, @GROUP, a glob of names, HOST[:PORT], https://HOST:PORT/ or '
        'poll://SUBSCRIPTION/; ! ahead of one leaves it out',
    ),
    _option(
        '-t',
        dest='targets_file',
        metavar='FILE',
        action='append',
        default=[],
        help='targets from a file, one a line; - is standard input',
    ),
)
_CALL_OPTIONS = _PROXY_OPTIONS + (
    _option(
        '--trust',
        metavar='THUMBPRINT',
        help='of the tentacle, for this run (default: the pinned one)',
    ),
    _option(
        '--listen-for-polling',
        metavar='PORT',
        nargs='?',
        const=str(POLLING_PORT),
        help='for polling tentacles, where no `serve` runs: let them come to this port (default: '
        '10943) for as long as it takes',
    ),
    _option(
        '--queue-timeout',
        metavar='SECONDS',
        default='120',
        help='how long a polling tentacle may take to fetch a call (default: 120)',
    ),
)


@contextlib.contextmanager
def _clients(arguments: Any, settings: Settings) -> Iterator[Callable[[ServiceEndPoint], Any]]:
    """What gives a client for a target: dialled, through our `serve`, or through a server of our
    own.
    """
    dispatcher = Dispatcher(settings.home)
    server = None
    lock = threading.Lock()

    def client_of(endpoint: ServiceEndPoint) -> Any:
        nonlocal server
        if not endpoint.is_polling or arguments.listen_for_polling is None:
            return dispatcher.client(endpoint)
        with lock:
            if server is None:
                port = _port(arguments.listen_for_polling)
                given = [endpoint.thumbprint] if endpoint.thumbprint else []
                server = _polling_server(arguments, settings, dispatcher.identity, given, port)
                if not arguments.verbose:
                    logger.setLevel(logging.WARNING)  # who comes is of no interest
                server.start()
        return server.client(endpoint)

    try:
        yield client_of
    finally:
        if server is not None:
            server.stop()


def _read_script(arguments: Any) -> str:
    """The script that `exec` was given. Raises UsageError."""
    words = arguments.words
    if bool(words) == (arguments.script is not None):
        raise UsageError(
            'give the script as --script FILE, as --script - (standard input), '
            'or as a command after --, in one of these ways'
        )
    if words:
        import shlex

        if not ' '.join(words).strip():
            raise UsageError('The command is empty')
        return words[0] if len(words) == 1 else ' '.join(shlex.quote(word) for word in words)
    name = 'standard input' if arguments.script == '-' else arguments.script
    try:
        if arguments.script == '-':
            content = sys.stdin.buffer.read()
        else:
            with open(arguments.script, 'rb') as file:
                content = file.read()
        text = content.decode('utf-8-sig')
    except OSError as error:
        raise UsageError('The script %s can not be read: %s' % (printable(name), error.strerror))
    except UnicodeDecodeError as error:
        raise UsageError(
            'The script %s is not UTF-8 (byte %d): save it as UTF-8'
            % (printable(name), error.start)
        )
    if not text.strip():
        raise UsageError('The script %s is empty' % printable(name))
    return text


def _open_file(path: str) -> BinaryIO:
    """A file of ours to send. Raises UsageError."""
    if os.path.isdir(path):
        name = os.path.basename(os.path.abspath(path))
        raise UsageError(
            '%s is a directory, and files go one by one. Send it as an archive, and unpack that '
            'there with tar: tar czf %s.tgz %s; upload %s.tgz TARGET:/tmp/%s.tgz; '
            'exec TARGET -- tar xzf /tmp/%s.tgz -C /WHERE' % (path, name, path, name, name, name)
        )
    try:
        file = open(path, 'rb', buffering=0)
    except OSError as error:
        raise UsageError('%s can not be read: %s' % (printable(path), error.strerror))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UsageError(
            '%s is not a file, so nobody knows its length: give it as standard input, with -' % path
        )
    return file  # type: ignore[return-value]


def _script_files(paths: List[str]) -> List[ScriptFile]:
    """The files of `exec --file`. Raises UsageError."""
    files = []
    for path in paths:
        with _open_file(path) as file:
            length = file.seek(0, os.SEEK_END)
        contents = DataStream(length, lambda path=path: open(path, 'rb'))
        files.append(ScriptFile(name=os.path.basename(path), contents=contents))
    names = [file.name for file in files]
    for name in names:
        if names.count(name) > 1:
            raise UsageError('two of the files are named %s' % printable(name))
    return files


def _chosen_targets(arguments: Any, settings: Settings) -> Dict[str, ServiceEndPoint]:
    """The targets of a command line, by their names. Raises UsageError."""
    words = list(arguments.targets)
    for path in arguments.targets_file:
        try:
            with sys.stdin if path == '-' else open(path, encoding='utf-8') as file:
                lines = [line.partition('#')[0].strip() for line in file]
        except (OSError, ValueError) as error:
            raise UsageError('The targets in %s can not be read: %s' % (printable(path), error))
        words += [line for line in lines if line]
    if not words:
        raise UsageError('which target? A name, @GROUP, HOST[:PORT] or poll://NAME/, or -t FILE')
    return Targets(settings.home).choose(words)


def _pinned(
    arguments: Any, known: Targets, name: str, endpoint: ServiceEndPoint
) -> ServiceEndPoint:
    """A target as it shall be called. Raises UsageError, UntrustedThumbprint."""
    if arguments.trust is not None:
        endpoint = endpoint._replace(thumbprint=parse_thumbprint(arguments.trust))
    if endpoint.is_polling:
        timeout = _number('--queue-timeout', arguments.queue_timeout, 1, 10**6)
        return endpoint._replace(queue_timeout=float(timeout))
    proxy_of = _proxy_chooser(arguments) if arguments.proxy is not None else None
    return known.to_call(name, endpoint, proxy_of, _program(arguments, 'trust'))


def _pinned_target(arguments: Any, settings: Settings, target: str) -> ServiceEndPoint:
    known = Targets(settings.home)
    targets = known.choose([target])
    if len(targets) > 1:
        raise UsageError('%s means %d targets, and one is taken' % (target, len(targets)))
    ((name, endpoint),) = targets.items()
    return _pinned(arguments, known, name, endpoint)


def _connected(settings: Settings) -> List[Dict[str, Any]]:
    """The polling tentacles that are connected to our `serve`, where one runs."""
    if not os.path.exists(relay_path(settings.home)):
        return []
    with contextlib.suppress(NotDelivered):
        return Dispatcher(settings.home).ask_serve('Connections')
    return []


def _say_table(rows: List[Tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        say('  '.join(text.ljust(width) for text, width in zip(row, widths)).rstrip())


_VERSION_SCRIPT = 'echo "${TentaclePyVersion:+tentacle.py $TentaclePyVersion, }$TentacleVersion"'


def _check(client: Any) -> Dict[str, Any]:
    """What a tentacle says of itself. Raises TentacleError."""
    capabilities = client.capabilities()
    begun = time.monotonic()
    with contextlib.suppress(ServiceError):  # an old tentacle; over the warm connection
        client.call('ICapabilitiesServiceV2', 'GetCapabilities')
    latency = time.monotonic() - begun
    lines: List[OutputLine] = []
    client.run_script(_VERSION_SCRIPT, lines.append)
    version = ScriptResult(0, lines).stdout.strip()
    return {
        'latency_ms': round(latency * 1000, 1),
        'version': version,
        'capabilities': capabilities,
    }


class _Patience:
    """Tells a person at a terminal, after some seconds, which targets have not answered yet."""

    _SECONDS = 3.0

    def __init__(self, settings: Settings, targets: Dict[str, ServiceEndPoint]):
        self._settings = settings
        self._waiting = OrderedDict(targets)
        self._timer = threading.Timer(self._SECONDS, self._tell)
        self._timer.daemon = True
        if sys.stderr.isatty():
            self._timer.start()

    def answered(self, name: str) -> None:
        """Any thread may call."""
        self._waiting.pop(name, None)

    def end(self) -> None:
        self._timer.cancel()

    def _tell(self) -> None:
        waiting = list(self._waiting.items())
        if len(waiting) == 1:
            _complain('waiting for %s' % self._what(*waiting[0]))
        elif waiting:
            names = ', '.join(name for name, _ in waiting[:5])
            more = ' and %d others' % (len(waiting) - 5) if len(waiting) > 5 else ''
            _complain('waiting for %s%s' % (names, more))

    def _what(self, name: str, endpoint: ServiceEndPoint) -> str:
        if not endpoint.is_polling:
            return '%s to answer' % name
        seen = None
        with contextlib.suppress(TentacleError):
            seen = Dispatcher(self._settings.home).ask_serve('LastSeen', endpoint.uri)
        if seen is None:
            return '%s to poll; it has not been seen yet' % name
        return '%s to poll, last seen %s ago' % (name, _ago(time.time() - seen))


def _check_all(
    arguments: Any,
    settings: Settings,
    targets: Dict[str, ServiceEndPoint],
    polling: Container[str],
) -> Dict[str, Dict[str, Any]]:
    """What each target says, or why it says nothing."""
    found: Dict[str, Dict[str, Any]] = {}
    known = Targets(settings.home)
    with _clients(arguments, settings) as client_of:

        def run_on(name: str) -> int:
            endpoint = _pinned(arguments, known, name, targets[name])
            if endpoint.is_polling and arguments.listen_for_polling is None:
                if endpoint.uri not in polling:
                    raise NotDelivered('it is not connected to our `serve`')
            with client_of(endpoint) as client:
                found[name] = _check(client)
            return 0

        parallel = _number('--parallel', arguments.parallel, 1, 1000)
        fan_out = FanOut(run_on, parallel, limits=LIMITS._replace(cancelled_script=0.5))
        patience = _Patience(settings, targets)
        for result in fan_out.results(list(targets)):
            patience.answered(result.target)
            found.setdefault(result.target, {})
            found[result.target].update(state=result.state, error=result.error)
        patience.end()
    return found


def _say_checked(listed: List[Dict[str, Any]]) -> None:
    rows = [('NAME', 'STATE', 'MS', 'VERSION', 'CAPABILITIES OR ERROR')]
    for facts in listed:
        told = ' '.join(facts.get('capabilities', [])) or facts.get('error', '')
        latency = str(facts.get('latency_ms', '-'))
        version = printable(facts.get('version') or '-', 60)
        rows.append((facts['target'], facts['state'], latency, version, printable(told)))
    _say_table(rows)


def _say_known(listed: List[Tuple[Dict[str, Any], Dict[str, Any]]]) -> None:
    now = time.time()
    rows = [('NAME', 'STATE', 'ADDRESS', 'THUMBPRINT', 'GROUPS', 'FROM', 'SINCE', 'LAST SEEN')]
    for facts, entry in listed:
        row = [facts['target'], facts['state'], facts['uri'], facts['thumbprint'] or '-']
        row += [' '.join(facts['groups']) or '-', facts['address'] or '-']
        row += [_ago(now - entry[key]) if entry else '-' for key in ('since', 'last_seen')]
        rows.append(tuple(row))
    _say_table(rows)


@_command(
    'targets',
    'list the tentacles that are known here, and those that are connected to our server',
    "tentacle.py targets\n  tentacle.py targets --check @web '!web-3'",
    *_TARGETS_OPTIONS,
    _option('--check', action='store_true', help='ask each for its version, and how long it takes'),
    _PARALLEL_OPTION,
    _option('--json', action='store_true', help='one object a line'),
    *_CALL_OPTIONS,
)
def _targets(arguments: Any) -> int:
    settings = _settings(arguments)
    known = Targets(settings.home)
    connected = _connected(settings)
    named = known.all()
    targets = known.all()
    known_uris = {endpoint.uri for endpoint in named.values()}
    for entry in connected:
        if entry['subscription'] not in known_uris:
            targets[entry['subscription']] = ServiceEndPoint(
                entry['subscription'], entry['thumbprint']
            )
    if arguments.targets or arguments.targets_file:
        targets = _chosen_targets(arguments, settings)
    polling = {entry['subscription'] for entry in connected}
    checked = _check_all(arguments, settings, targets, polling) if arguments.check else {}
    listed = []
    for name, endpoint in targets.items():
        facts: Dict[str, Any] = {
            'target': name,
            'uri': endpoint.uri,
            'thumbprint': endpoint.thumbprint,
            'groups': sorted(known.groups(name)) if name in named else [],
            'state': 'listening',
        }
        if endpoint.is_polling:
            facts['state'] = 'connected' if endpoint.uri in polling else 'away'
        own = [entry for entry in connected if entry['subscription'] == endpoint.uri]
        for entry in own or [{}]:
            facts = dict(facts, address=entry.get('address'))
            for key in ('since', 'last_seen'):
                facts[key] = entry and iso_time(int(entry[key] * 1000)) or None
            listed.append((dict(facts, **checked.get(name, {})), entry))
    if arguments.json:
        for facts, _ in listed:
            say(json.dumps(facts))
    elif arguments.check:
        _say_checked([facts for facts, _ in listed])
    else:
        _say_known(listed)
    return int(any(facts['state'] != 'ok' for facts in checked.values()))


class _LinePrinter:
    """Prints a script's lines as they come: its stdout on ours, its stderr on ours, remarks when
    asked for.
    """

    def __init__(self, verbose: bool):
        self._verbose = verbose

    def __call__(self, line: OutputLine) -> None:
        if line.remark:
            if self._verbose:
                print(line.text, file=sys.stderr, flush=True)
        else:
            print(line.text, file=sys.stderr if line.source == STDERR else sys.stdout, flush=True)


def _stop_at_signal(stop: threading.Event) -> List[int]:
    """Have Ctrl-C and SIGTERM set an event; the second leaves at once. The list gets what came."""
    came: List[int] = []

    def note(number: int, frame: Any) -> None:
        came.append(number)
        if len(came) > 1:
            os._exit(130)
        os.write(2, b'Cancelling what runs; once more to leave at once\n')
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return came


def _wants_colour(stream: Any) -> bool:
    """On a terminal, unless NO_COLOR (no-color.org) or the terminal says otherwise."""
    return stream.isatty() and not os.environ.get('NO_COLOR') and os.environ.get('TERM') != 'dumb'


class _ManyPrinter:
    """Prints what comes from several targets, each line behind the name of its own; a table at the
    end on a terminal. Any thread may call.
    """

    _COLOURS = (36, 33, 32, 35, 34, 96, 93, 92, 95, 94)

    def __init__(self, arguments: Any, names: Sequence[str]):
        self._arguments = arguments
        self._lock = threading.Lock()
        self._names = list(names)
        self._width = min(max(map(len, names)), 30)
        self._coloured = _wants_colour(sys.stdout)
        self.is_broken = False
        self._kept: Dict[str, List[OutputLine]] = {name: [] for name in names}

    def line(self, name: str, line: OutputLine) -> None:
        if self._arguments.quiet or line.remark and not self._arguments.verbose:
            return
        with self._lock:
            if self._arguments.group_output and not self._arguments.json:
                self._kept.setdefault(name, []).append(line)
            else:
                self._print(name, line)

    def _print(self, name: str, line: OutputLine) -> None:
        if self._arguments.json:
            source = 'remark' if line.remark else 'stderr' if line.source == STDERR else 'stdout'
            self._event('line', name, source=source, time=iso_time(line.occurred), text=line.text)
            return
        stream = sys.stderr if line.remark or line.source == STDERR else sys.stdout
        try:
            print('%s %s' % (self._label(name), line.text), file=stream, flush=True)
        except BrokenPipeError:  # who read our output has left
            self.is_broken = True
            raise Cancelled('nobody reads the output any more')

    def _label(self, name: str) -> str:
        label = '%-*s |' % (self._width, printable(name, self._width))
        if not self._coloured:
            return label
        colour = self._COLOURS[self._names.index(name) % len(self._COLOURS)]
        return '\x1b[%dm%s\x1b[0m' % (colour, label)

    def _event(self, event: str, name: str, **facts: Any) -> None:
        say(json.dumps(dict({'event': event, 'target': name}, **facts)))

    def result(self, result: TargetResult) -> None:
        if self.is_broken:
            return
        with self._lock:
            for line in self._kept.pop(result.target, ()):
                self._print(result.target, line)
            if self._arguments.json:
                facts = dict(result._asdict(), seconds=round(result.seconds, 3))
                del facts['target']
                self._event('result', result.target, **facts)
            elif self._arguments.quiet:
                code = '-' if result.exit_code is None else result.exit_code
                say('%s %s' % (result.target, code))
            if result.error and not self._arguments.json:
                _complain('%s: %s' % (result.target, result.error))

    def summary(self, results: List[TargetResult]) -> None:
        """The table, failures last; and on every way their names."""
        if self._arguments.json or self.is_broken:
            return
        failed = [result for result in results if result.state != 'ok']
        if sys.stderr.isatty() and not self._arguments.quiet:
            self._table([result for result in results if result.state == 'ok'] + failed)
        for state, chosen in (
            ('failed', [result for result in failed if result.state != 'skipped']),
            ('skipped', [result for result in failed if result.state == 'skipped']),
        ):
            if chosen:
                names = ', '.join(result.target for result in chosen)
                _complain('%d of %d %s: %s' % (len(chosen), len(results), state, names))

    def _table(self, results: List[TargetResult]) -> None:
        import shutil

        columns = max(shutil.get_terminal_size().columns, 30)
        width = min(max(len('TARGET'), *(len(name) for name in self._names)), columns - 29)
        row = '%-*s  %-11s  %4s  %7s'
        print(row % (width, 'TARGET', 'STATE', 'CODE', 'SECONDS'), file=sys.stderr)
        coloured = _wants_colour(sys.stderr)
        for result in results:
            code = '-' if result.exit_code is None else str(result.exit_code)
            name = (
                result.target if len(result.target) <= width else result.target[: width - 1] + '…'
            )
            text = row % (width, name, result.state, code, '%.1f' % result.seconds)
            if coloured and result.state != 'ok':
                text = '\x1b[31m%s\x1b[0m' % text
            print(text, file=sys.stderr, flush=True)


_EXIT_CODE_MEANINGS = {
    FATAL_EXIT_CODE: 'the tentacle could not run it, or not write its log',
    CANCELED_EXIT_CODE: 'it was cancelled',
    UNKNOWN_TICKET_EXIT_CODE: 'the tentacle does not know it (any more)',
    UNKNOWN_RESULT_EXIT_CODE: 'its result is unknown: the tentacle was restarted while it ran',
}


def _exec_on_one(
    arguments: Any,
    settings: Settings,
    name: str,
    endpoint: ServiceEndPoint,
    script: str,
    files: List[ScriptFile],
) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    with _clients(arguments, settings) as client_of, client_of(endpoint) as client:
        patience = _Patience(settings, {name: endpoint})
        try:
            client.capabilities()
        finally:
            patience.end()
        exit_code = client.run_script(script, _LinePrinter(arguments.verbose), files=files)
    if exit_code < 0:
        print(
            'The script ended with code %d: %s'
            % (exit_code, _EXIT_CODE_MEANINGS.get(exit_code, 'not its own')),
            file=sys.stderr,
        )
    return exit_code if 0 <= exit_code <= 255 else exit_code & 0xFF or 1


def _exec_on_many(
    arguments: Any,
    settings: Settings,
    targets: Dict[str, ServiceEndPoint],
    script: str,
    files: List[ScriptFile],
) -> int:
    rolling = arguments.rolling and _number('--rolling', arguments.rolling, 1, 10**6)
    max_fail = arguments.max_fail and _number('--max-fail', arguments.max_fail, 0, 10**6)
    parallel = _number('--parallel', arguments.parallel, 1, 1000)
    printer = _ManyPrinter(arguments, list(targets))
    known = Targets(settings.home)
    with _clients(arguments, settings) as client_of:

        def run_on(name: str) -> int:
            endpoint = _pinned(arguments, known, name, targets[name])
            with client_of(endpoint) as client:
                client.capabilities()
                patience.answered(name)
                fan_out.begins(name)
                on_line = lambda line: printer.line(name, line)
                return client.run_script(script, on_line, files=files, stop=fan_out.stop)

        fan_out = FanOut(run_on, parallel, rolling, max_fail)
        signals = _stop_at_signal(fan_out.stop)
        patience = _Patience(settings, targets)
        results = []
        for result in fan_out.results(list(targets)):
            patience.answered(result.target)
            results.append(result)
            printer.result(result)
            if printer.is_broken:
                fan_out.stop.set()
        patience.end()
    printer.summary(results)
    return 130 if signals else int(any(result.state != 'ok' for result in results))


def _duration(text: str) -> int:
    """Seconds of `90s`, `30m`, `2h` or `7d`. Raises UsageError."""
    match = re.match(r'([0-9]{1,6})([smhd])\Z', text)
    if not match:
        raise UsageError('%s is no time: like 90s, 30m, 2h or 7d expected' % printable(text))
    return int(match.group(1)) * {'s': 1, 'm': 60, 'h': 3600, 'd': 86400}[match.group(2)]


def _detach(
    arguments: Any, settings: Settings, targets: Dict[str, ServiceEndPoint], script: str
) -> int:
    for option in ('file', 'rolling', 'max_fail', 'trust', 'proxy', 'listen_for_polling', 'quiet'):
        if getattr(arguments, option) not in (None, False, []):
            name = option.replace('_', '-')
            raise UsageError('--%s does not go with --detach' % name)
    expires = None
    if arguments.expires is not None:
        expires = time.time() + _duration(arguments.expires)
    dispatcher = Dispatcher(settings.home)
    numbers = dispatcher.submit(list(targets), script, expires, arguments.retry_lost)
    for name, number in numbers.items():
        facts = {'job': number, 'target': name}
        say(json.dumps(facts) if arguments.json else '%d %s' % (number, name))
    return 0


@_command(
    'exec',
    'run a script on tentacles, and see its output as it comes',
    'tentacle.py exec web-1 -- uptime\n  tentacle.py exec web-1 -- "df -h | tail -3"\n'
    '  tentacle.py exec web-1 --script deploy.sh --file app.conf\n'
    "  tentacle.py exec @web 'db-*' '!db-3' --rolling 5 --max-fail 1 --script deploy.sh",
    *_TARGETS_OPTIONS,
    _PARALLEL_OPTION,
    _option('--script', metavar='FILE', help='the script; - is standard input'),
    _option(
        '--file',
        metavar='FILE',
        action='append',
        default=[],
        help='put it beside the script, whose working directory that is; may be repeated; not with '
        '--detach',
    ),
    _option('--rolling', metavar='N', help='in waves of N targets, one after the other'),
    _option('--max-fail', metavar='K', help='begin no other target when more than K have failed'),
    _option('--group-output', action='store_true', help="each target's lines together, at its end"),
    _option('--quiet', action='store_true', help='no output, but each target with its exit code'),
    _option(
        '--detach',
        action='store_true',
        help='leave it to `serve` as a job for each target, whose numbers are printed',
    ),
    _option(
        '--expires',
        metavar='TIME',
        help='with --detach: not to be begun after this time, like 90s, 30m, 2h or 7d',
    ),
    _option(
        '--retry-lost',
        action='store_true',
        help='with --detach: begin it anew when its tentacle lost it, though it may have run',
    ),
    _JSON_OPTION,
    *_CALL_OPTIONS,
    words='-- COMMAND: one word is a line for the shell, several are a command and its arguments',
)
def _exec(arguments: Any) -> int:
    script = _read_script(arguments)
    files = _script_files(arguments.file)
    settings = _settings(arguments)
    targets = _chosen_targets(arguments, settings)
    if arguments.detach:
        return _detach(arguments, settings, targets, script)
    if arguments.expires or arguments.retry_lost:
        raise UsageError('--expires and --retry-lost are for --detach')
    if len(targets) == 1 and not (arguments.json or arguments.quiet):
        ((name, endpoint),) = targets.items()
        endpoint = _pinned(arguments, Targets(settings.home), name, endpoint)
        return _exec_on_one(arguments, settings, name, endpoint, script, files)
    return _exec_on_many(arguments, settings, targets, script, files)


def _job_facts(job: Job) -> Dict[str, Any]:
    """A job for --json."""
    facts: Dict[str, Any] = {'job': job.number, 'target': job.target, 'state': job.state}
    facts.update(exit_code=job.exit_code, error=job.error, script=job.script)
    for key in ('created', 'started', 'ended', 'expires'):
        moment = getattr(job, key)
        facts[key] = None if moment is None else iso_time(moment)
    return facts


def _dispatcher(arguments: Any) -> Dispatcher:
    return Dispatcher(_settings(arguments).home)


def _tell_where_no_serve_runs(dispatcher: Dispatcher) -> None:
    try:
        dispatcher.ask_serve('LastSeen', 'poll://nobody/')
    except TentacleError:
        _complain('no `serve` of %s runs, so no job goes on' % dispatcher.home)


def _job_number(text: str) -> int:
    return _number('the number of a job', text, 1, 2**62)


@_command(
    'jobs',
    'list the jobs of `exec --detach` that are not over, or all',
    'tentacle.py jobs --all',
    _option('--all', action='store_true', help='those that are over as well'),
    _option('--json', action='store_true', help='one object a line'),
)
def _jobs(arguments: Any) -> int:
    dispatcher = _dispatcher(arguments)
    with dispatcher.job_store() as store:
        jobs = store.jobs(everything=arguments.all)
    if arguments.json:
        for job in jobs:
            say(json.dumps(_job_facts(job)))
        return 0
    rows = [('JOB', 'TARGET', 'STATE', 'CODE', 'AGE', 'SCRIPT', 'NOTE')]
    for job in jobs:
        script = printable(job.script.strip().partition('\n')[0], 30)
        code = '-' if job.exit_code is None else str(job.exit_code)
        age = _ago(time.time() - job.created / 1000)
        note = printable(job.error)
        rows.append((str(job.number), job.target, job.state, code, age, script, note))
    _say_table(rows)
    if any(not job.is_over for job in jobs):
        _tell_where_no_serve_runs(dispatcher)
    return 0


@_command(
    'job',
    'show a job',
    'tentacle.py job 7',
    _option('job', metavar='N', help='its number'),
)
def _job(arguments: Any) -> int:
    with _dispatcher(arguments).job_store() as store:
        job = store.job(_job_number(arguments.job))
    say(json.dumps(_job_facts(job), indent=2 if sys.stdout.isatty() else None))
    return 0


_LINES_STEP = 10000  # a long log is not held in memory


@_command(
    'logs',
    "show a job's output",
    'tentacle.py logs 7 -f',
    _option('job', metavar='N', help='its number'),
    _option('-f', '--follow', action='store_true', help='go on until it is over'),
)
def _logs(arguments: Any) -> int:
    printer, remarks, after = _LinePrinter(arguments.verbose), RemarkFilter(), 0
    dispatcher = _dispatcher(arguments)
    with dispatcher.job_store() as store:
        if arguments.follow and not store.job(_job_number(arguments.job)).is_over:
            _tell_where_no_serve_runs(dispatcher)
        begun, is_told = time.monotonic(), False
        while True:
            job = store.job(_job_number(arguments.job))
            lines = store.lines(job.number, after, _LINES_STEP)
            for number, entry in lines:
                printer(remarks.line(entry))
                after = number + 1
            if lines:
                continue
            if job.is_over or not arguments.follow:
                break
            if job.state == 'waiting' and not is_told and time.monotonic() - begun > 3:
                is_told = True
                _complain('job %d waits for %s' % (job.number, printable(job.target)))
            time.sleep(0.3)
    if arguments.follow and job.state != 'finished':
        raise TentacleError(
            'Job %d: %s%s' % (job.number, job.state, job.error and ', ' + job.error)
        )
    return 0


@_command(
    'cancel',
    'cancel a job',
    'tentacle.py cancel 7',
    _option('jobs', metavar='N', nargs='+', help='its number'),
)
def _cancel(arguments: Any) -> int:
    dispatcher = _dispatcher(arguments)
    code = 0
    for number in [_job_number(text) for text in arguments.jobs]:
        try:
            state = dispatcher.cancel(number)
        except UsageError as error:
            _complain(str(error))
            code = error.exit_code
            continue
        if state in _JOB_IS_OVER:
            say('Job %d was %s already' % (number, state))
        else:
            say('Job %d is being cancelled' % number)
    return code


def _remote_place(text: str) -> Tuple[str, str]:
    """(target, path) of TARGET:PATH. Raises UsageError."""
    match = re.match(
        r'((?:https|poll)://[^/]+/?'
        r'|(?!\w+://)(?:\[[^\]]+\]|[^:/\[\]]+)(?::\d{1,5}(?=:))?):(.+)\Z',
        text,
        re.S,
    )
    if not match:
        raise UsageError(
            '%s is no place of a file: TARGET:PATH expected, like web-1:/etc/motd' % printable(text)
        )
    if re.match(r'[0-9]{1,5}\Z', match.group(2)):
        raise UsageError(
            '%s names no file: TARGET:PATH expected, like %s:/tmp/file (or :./%s)'
            % (printable(text), printable(text), match.group(2))
        )
    return match.group(1), match.group(2)


def _amount(count: float) -> str:
    """A number of bytes for people."""
    for unit in ('B', 'kB', 'MB', 'GB'):
        if count < 1000 or unit == 'GB':
            break
        count /= 1000
    return '%.*f %s' % (0 if unit == 'B' else 1, count, unit)


class _TransferReport:
    """Says how a transfer goes: as a bar on a terminal, as events with --json, else at its end."""

    _PAUSE = {True: 1.0, False: 0.1}  # seconds between two words, as events and as a bar

    def __init__(self, as_json: bool, target: str, path: str, total: int = 0):
        self._as_json = as_json
        self._place = {'target': target, 'path': path}
        self._total = total
        self._begin = self._said = time.monotonic()
        is_dumb = not sys.stderr.isatty() or os.environ.get('TERM') == 'dumb'
        self._silent = not as_json and is_dumb
        self._width = 0

    def _event(self, event: str, **facts: Any) -> None:
        say(json.dumps(dict({'event': event}, **self._place, **facts)))

    def progress(self, done: int, total: int = 0) -> None:
        now = time.monotonic()
        if self._silent or now - self._said < self._PAUSE[self._as_json]:
            return
        self._said = now
        total = total or self._total
        if self._as_json:
            self._event('progress', bytes=done, total=total)
            return
        rate = done / (now - self._begin)
        left = int((total - done) / rate) if rate else 0
        text = '%3d%%  %s of %s  %s/s  %d:%02d left' % (
            done * 100 // max(total, 1),
            _amount(done),
            _amount(total),
            _amount(rate),
            left // 60,
            left % 60,
        )
        self._show('%s:%s  %s' % (self._place['target'], printable(self._place['path']), text))

    def _show(self, text: str) -> None:
        """Write over the line that stands there; its end counts more than its beginning, and where
        both do not fit, its beginning goes word by word.
        """
        import shutil

        columns = shutil.get_terminal_size().columns - 1
        if len(text) > columns:
            text = text[-columns:].partition('  ')[2]
        print('\r' + text.ljust(self._width), end='', file=sys.stderr, flush=True)
        self._width = len(text)

    def clear(self) -> None:
        """Take the bar away."""
        if self._width:
            print('\r' + ' ' * self._width + '\r', end='', file=sys.stderr, flush=True)
            self._width = 0

    def done(self, transferred: Transferred, text: str, out: Any = None) -> None:
        self.clear()
        seconds = time.monotonic() - self._begin
        if self._as_json:
            self._event(
                'done',
                full_path=transferred.path,
                bytes=transferred.length,
                sha1=transferred.sha1,
                seconds=round(seconds, 3),
            )
            return
        print(
            '%s (%s, %s/s, SHA-1 %s)'
            % (
                text,
                _amount(transferred.length),
                _amount(transferred.length / max(seconds, 1e-3)),
                transferred.sha1,
            ),
            file=out or sys.stdout,
            flush=True,
        )

    def failed(self, error: Exception) -> None:
        if self._as_json:
            self._event('failed', error=str(error))


class _OneBar:
    """The bar of several transfers together. Any thread may call."""

    def __init__(self, name: str, path: str, total: int):
        self._lock = threading.Lock()
        self._done: Dict[Any, int] = {}
        self._report = _TransferReport(False, name, path, total)

    def progress(self, which: Any, done: int) -> None:
        with self._lock:
            self._done[which] = done
            self._report.progress(sum(self._done.values()))

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Something else is said meanwhile."""
        with self._lock:
            self._report.clear()
            yield


@contextlib.contextmanager
def _file_to_send(name: str) -> Iterator[Callable[[], BinaryIO]]:
    """What opens a file of ours, or a copy of standard input, whose length the wire wants to know
    first.
    """
    if name != '-':
        yield lambda: _open_file(name)
        return
    import shutil
    import tempfile

    with tempfile.NamedTemporaryFile() as copy:
        shutil.copyfileobj(sys.stdin.buffer, copy, _COPY_STEP)
        copy.flush()
        yield lambda: open(copy.name, 'rb', buffering=0)  # type: ignore[return-value]


def _upload_to_one(
    arguments: Any,
    client: Any,
    open_file: Callable[[], BinaryIO],
    name: str,
    path: str,
    on_progress: Optional[Callable[[int], None]] = None,
    aside: Callable[[], Any] = contextlib.ExitStack,
) -> None:
    """Raises what `upload` of a client does."""
    with open_file() as file:
        report = _TransferReport(arguments.json, name, path, file.seek(0, os.SEEK_END))
        try:
            result = client.upload(file, path, on_progress or report.progress)
            with aside():
                report.done(result, 'Uploaded to %s:%s' % (name, printable(result.path)))
        except TentacleError as error:
            report.failed(error)
            raise
        finally:
            report.clear()


def _upload_to_many(
    arguments: Any,
    settings: Settings,
    client_of: Callable[[ServiceEndPoint], Any],
    open_file: Callable[[], BinaryIO],
    places: Dict[str, Tuple[str, str, ServiceEndPoint]],
) -> int:
    known = Targets(settings.home)
    with open_file() as file:
        total = file.seek(0, os.SEEK_END)
    file_name = os.path.basename(arguments.file)
    bar = _OneBar('%d targets' % len(places), file_name, total * len(places))

    def run_on(place: str) -> int:
        name, path, endpoint = places[place]

        def progress(done: int) -> None:
            if fan_out.stop.is_set():
                raise Cancelled('it was cancelled')
            if arguments.json:
                report.progress(done, total)
            else:
                bar.progress(place, done)

        report = _TransferReport(arguments.json, name, path, total)
        with client_of(_pinned(arguments, known, name, endpoint)) as client:
            client.capabilities()
            patience.answered(place)
            fan_out.begins(place)
            _upload_to_one(arguments, client, open_file, name, path, progress, bar.aside)
        return 0

    fan_out = FanOut(run_on, _number('--parallel', arguments.parallel, 1, 1000))
    signals = _stop_at_signal(fan_out.stop)
    patience = _Patience(settings, {place: facts[2] for place, facts in places.items()})
    failed = []
    for result in fan_out.results(list(places)):
        patience.answered(result.target)
        if result.state != 'ok':
            failed.append(result.target)
            with bar.aside():
                _complain('%s: %s' % (result.target, result.error))
    patience.end()
    with bar.aside():
        if failed:
            _complain('%d of %d failed: %s' % (len(failed), len(places), ', '.join(failed)))
    return 130 if signals else int(bool(failed))


@_command(
    'upload',
    'copy a file to tentacles',
    'tentacle.py upload app.tgz web-1:/opt/app.tgz web-2:/opt/app.tgz\n'
    '  tentacle.py upload app.tgz @web:/opt/app.tgz\n'
    '  pg_dump shop | tentacle.py upload - backup:/srv/shop.sql',
    _option('file', metavar='FILE', help='the file; - is standard input'),
    _option(
        'places',
        metavar='TARGET:PATH',
        nargs='+',
        help='where to; a relative path is under the home directory of the tentacle; !TARGET '
        'leaves one out',
    ),
    _PARALLEL_OPTION,
    _JSON_OPTION,
    *_CALL_OPTIONS,
)
def _upload(arguments: Any) -> int:
    settings = _settings(arguments)
    targets = Targets(settings.home)
    places = OrderedDict()
    left_out = [text for text in arguments.places if text.startswith('!')]
    for text in arguments.places:
        if text not in left_out:
            target, path = _remote_place(text)
            for name, endpoint in targets.choose([target]).items():
                places['%s:%s' % (name, path)] = name, path, endpoint
    if left_out:
        chosen = targets.choose([name for name, _, _ in places.values()] + left_out)
        places = OrderedDict((key, facts) for key, facts in places.items() if facts[0] in chosen)
    if not places:
        raise UsageError('where to? TARGET:PATH expected, like web-1:/opt/app.tgz')
    with _file_to_send(arguments.file) as open_file, _clients(arguments, settings) as client_of:
        if len(places) > 1:
            return _upload_to_many(arguments, settings, client_of, open_file, places)
        ((name, path, endpoint),) = places.values()
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
        try:
            with client_of(_pinned(arguments, targets, name, endpoint)) as client:
                _upload_to_one(arguments, client, open_file, name, path)
        except TentacleError as error:
            _complain('%s: %s' % (name, error))
            return error.exit_code
    return 0


@contextlib.contextmanager
def _file_to_receive(name: str, remote_path: str) -> Iterator[BinaryIO]:
    """Where to write a download to: standard output, a device, or a file that is replaced at the
    end.
    """
    path = os.path.realpath(name)
    if os.path.isdir(path):
        path = os.path.join(path, os.path.basename(remote_path.replace('\\', '/')))
    if name == '-':
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
    elif os.path.exists(path) and not os.path.isfile(path):
        with open(path, 'wb') as device:
            yield device  # type: ignore[misc]
    else:
        if not os.path.isdir(os.path.dirname(path)):
            raise UsageError('There is no folder %s for it' % printable(os.path.dirname(path)))
        folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
        try:
            details = file_details(folder, os.path.basename(path), path)
            temporary = TEMPORARY_PREFIX + secrets.token_hex(8)
            with replacing(folder, os.path.basename(path), temporary, details) as file:
                yield file
        finally:
            os.close(folder)


@_command(
    'download',
    'copy a file from a tentacle',
    'tentacle.py download web-1:/var/log/syslog syslog.web-1\n'
    '  tentacle.py download web-1:/etc/hosts - | sort',
    _option('place', metavar='TARGET:PATH', help='where from'),
    _option('file', metavar='FILE', help='where to; - is standard output'),
    _JSON_OPTION,
    *_CALL_OPTIONS,
)
def _download(arguments: Any) -> int:
    if arguments.json and arguments.file == '-':
        raise UsageError('--json and the file - both want standard output')
    target, path = _remote_place(arguments.place)
    settings = _settings(arguments)
    endpoint = _pinned_target(arguments, settings, target)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    report = _TransferReport(arguments.json, target, path)
    try:
        with _clients(arguments, settings) as client_of, client_of(endpoint) as client:
            with _file_to_receive(arguments.file, path) as file:
                result = client.download(path, file, report.progress)
                if result is None:
                    raise TentacleError('There is no file %s on %s' % (printable(path), target))
        out = sys.stderr if arguments.file == '-' else sys.stdout
        report.done(result, 'Downloaded from %s:%s' % (target, printable(path)), out)
    except (TentacleError, OSError) as error:
        report.failed(error)
        raise
    finally:
        report.clear()
    return 0


def _confirmed(question: str) -> bool:
    print(question, end='', file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ('y', 'yes')


def _trust_target(arguments: Any, settings: Settings) -> int:
    targets = Targets(settings.home)
    endpoint = targets.find(arguments.target)
    if arguments.thumbprint is not None:
        thumbprint = parse_thumbprint(arguments.thumbprint)
        targets.pin(arguments.target, endpoint._replace(thumbprint=thumbprint))
        old = endpoint.thumbprint
        instead = ', in the place of %s' % old if old not in (None, thumbprint) else ''
        say('Pinned in %s%s' % (targets.path, instead))
        return 0
    if endpoint.is_polling:
        raise UsageError(
            '%s dials us, so its thumbprint can not be asked for: %s %s THUMBPRINT, as '
            '`tentacle.py show-thumbprint` prints it there'
            % (endpoint.uri, _program(arguments, 'trust'), arguments.target)
        )
    proxy = _proxy_chooser(arguments)(endpoint.uri)
    stream = dial_tls(endpoint.uri, our_identity(settings), proxy=proxy)
    thumbprint = stream.thumbprint
    stream.close()
    if thumbprint is None:
        raise ProtocolError('%s shows no certificate: it is no tentacle' % endpoint.uri)
    say('%s shows the thumbprint %s' % (endpoint.uri, thumbprint))
    if endpoint.thumbprint and is_pinned(stream.certificate, [endpoint.thumbprint]):
        say('It is trusted already.')
        return 0
    if endpoint.thumbprint:
        print(
            'IT HAS CHANGED: pinned is %s. Make sure that you know why.' % endpoint.thumbprint,
            file=sys.stderr,
        )
    print('Compare it with what `tentacle.py show-thumbprint` prints there.', file=sys.stderr)
    if not arguments.yes and not _confirmed('Trust it? [y/N] '):
        raise TentacleError('Not trusted; nothing was changed.')
    targets.pin(arguments.target, endpoint._replace(thumbprint=thumbprint))
    say('Pinned in %s' % targets.path)
    return 0


@_command(
    'trust',
    'see the other side\'s thumbprint and pin it, like ssh\'s known_hosts',
    'tentacle.py trust web-1\n  tentacle.py trust 6D7A63503024C1F8CBD8B6EDCAFCD6C84726EFB3',
    _option(
        'target',
        metavar='TARGET | THUMBPRINT',
        help='a tentacle to call; or the thumbprint of one who may call us',
    ),
    _option(
        'thumbprint',
        metavar='THUMBPRINT',
        nargs='?',
        help="of the TARGET, where it is known; a polling tentacle's can not be asked for",
    ),
    _option('--yes', action='store_true', help='do not ask'),
    *_PROXY_OPTIONS,
)
def _trust(arguments: Any) -> int:
    settings = _settings(arguments)
    try:
        if arguments.thumbprint is not None:
            raise UsageError('a target')
        thumbprint = parse_thumbprint(arguments.target)
    except UsageError:
        if re.match(r'[0-9A-Fa-f:\s]{30,}\Z', arguments.target) and '::' not in arguments.target:
            raise  # a thumbprint that is not whole
        return _trust_target(arguments, settings)
    change_trust(settings.path, add=[thumbprint])
    say('Trusted to call this host: ' + thumbprint)
    return 0


# -- the original's commands: instances, certificates and settings


UNIT_FOLDER = '/etc/systemd/system'


def _restart_hint() -> None:
    say('A running agent takes this over when it is restarted.')


def _parsed(option: str, text: str, pattern: str, expected: str) -> str:
    """An option's text as it is. Raises UsageError where it is not as expected."""
    if not re.match(pattern + r'\Z', text):
        raise UsageError('%s %s: %s expected' % (option, printable(text) or "''", expected))
    return text


def _boolean(option: str, text: str) -> bool:
    return _parsed(option, text.lower(), 'true|false', 'True or False') == 'true'


def _connection_count(text: str) -> int:
    if not re.match('[0-9]{1,9}\\Z', text):
        raise UsageError(
            "The polling connection count '%s' is not a valid whole number: 1 to 512 expected"
            % printable(text)
        )
    return _number('--pollingConnectionCount', text, 1, 512)


@_original(
    'create-instance',
    'Make the settings of a tentacle, and register it by a name on this machine',
    _value('--instance', 'Name of the instance; Tentacle, the default one, where there is none'),
    _value('--config', 'Settings file to make (default: tentacle-default.config in the home)'),
    _value('--home', 'Home directory (default: where the settings file is)'),
    has_instance=False,
)
def _create_instance(arguments: Any) -> int:
    name = arguments.instance or DEFAULT_INSTANCE
    home = arguments.home and os.path.abspath(arguments.home)
    path = arguments.config and os.path.abspath(arguments.config)
    if not path and home:
        path = os.path.join(home, SETTINGS_NAME)
    if not path:
        raise UsageError('Where shall its settings be? --config FILE or --home DIR expected')
    if os.path.isdir(path):
        raise UsageError('--config %s is a directory: name a file' % printable(path))
    before = [entry for entry in instances() if entry.name == name]
    create_instance(name, path, home)
    if before and before[0].settings_path != path:
        say('Until now it was %s, which stays where it is' % before[0].settings_path)
    say("Instance '%s' uses configuration '%s'." % (name, path))
    return 0


@_original('delete-instance', 'Forget an instance; its settings and its home stay where they are')
def _delete_instance(arguments: Any) -> int:
    if arguments.config is not None:
        path = os.path.abspath(arguments.config)
        named = instances_of(path)
        if not named:
            raise TentacleError('There is no instance with the settings %s' % path)
        instance = named[0]
    else:
        instance = find_instance(arguments.instance or DEFAULT_INSTANCE)
    delete_instance(instance)
    say('Deleted instance: %s. Its settings are still at %s' % instance)
    unit = os.path.join(UNIT_FOLDER, instance.name.replace(' ', '-') + '.service')
    if os.path.exists(unit):
        say('Its service is still there: systemctl disable --now, and remove %s' % unit)
    return 0


@_original(
    'list-instances', 'List the instances of this machine', _FORMAT_OPTION, has_instance=False
)
def _list_instances(arguments: Any) -> int:
    known = instances()
    if _wants_json(arguments):
        _write_json(
            [
                {'InstanceName': name, 'ConfigurationFilePath': settings_path}
                for name, settings_path in known
            ]
        )
        return 0
    for instance in known:
        print("Instance '%s' uses configuration '%s'." % instance)
    return 0


def _export_certificate(arguments: Any) -> int:
    import tempfile

    path = arguments.export_pfx or arguments.export_file
    if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
        raise UsageError('%s can not be written: there is no such folder' % printable(path))
    with tempfile.TemporaryDirectory() as folder:
        identity = create_identity(os.path.join(folder, CERTIFICATE_NAME))
        content = pfx_of_identity(identity, arguments.pfx_password or '')
    if arguments.export_file is not None:
        content = base64.b64encode(content)
    write_private(os.path.abspath(path), content)
    say('A new certificate was written to %s, its thumbprint is %s' % (path, identity.thumbprint))
    return 0


@_original(
    'new-certificate',
    'Make a new certificate and use it; the other sides must then trust its thumbprint',
    _option('--if-blank', '-b', action='store_true', help='Only when there is none yet'),
    _value(
        '--export-file',
        'Write a new one to this file, as the base64 text of a PFX file without a password, and '
        'do not use it here',
        '-e',
    ),
    _value('--export-pfx', 'Write a new one to this PFX file, and do not use it here'),
    _value('--pfx-password', 'The password of that PFX file'),
)
def _new_certificate(arguments: Any) -> int:
    exports = [arguments.export_file, arguments.export_pfx]
    if sum(map(bool, [arguments.if_blank] + exports)) > 1:
        raise UsageError('--if-blank, --export-file and --export-pfx do not go together')
    if arguments.export_pfx is not None and not arguments.pfx_password:
        raise UsageError('--export-pfx needs --pfx-password PASSWORD')
    if exports != [None, None]:
        return _export_certificate(arguments)
    settings = _logged_settings(arguments)
    if arguments.if_blank and (
        settings.original_certificate or os.path.exists(settings.certificate_path)
    ):
        existing = existing_identity(settings)
        if existing is not None:
            say('A certificate is there already, its thumbprint is ' + existing.thumbprint)
            return 0
    identity = create_identity(settings.certificate_path)
    record_identity(settings, identity)
    say('A new certificate was made, its thumbprint is ' + identity.thumbprint)
    return 0


@_original(
    'import-certificate',
    'Use the certificate and key of a file',
    _value(
        '--from-file',
        'PEM with both, PFX, or the text of new-certificate --export-file; the last two need the '
        'openssl program',
        '-f',
    ),
    _value('--pfx-password', 'The password of the PFX file (default: empty)', '--pw', default=''),
)
def _import_certificate(arguments: Any) -> int:
    if not arguments.from_file:
        raise UsageError('Which certificate? --from-file FILE expected')
    settings = _logged_settings(arguments)
    identity = import_identity(
        arguments.from_file, settings.certificate_path, arguments.pfx_password
    )
    record_identity(settings, identity)
    say('The certificate was imported, its thumbprint is ' + identity.thumbprint)
    _restart_hint()
    return 0


def write_file(path: str, content: bytes) -> None:
    """Write what is no secret. Raises TentacleError."""
    try:
        with open(path, 'wb') as file:
            file.write(content)
    except OSError as error:
        raise TentacleError('%s can not be written: %s' % (path, error.strerror))


@_original(
    'show-thumbprint',
    'Print our thumbprint, for the other side to trust',
    _value('--export-file', 'Write it to this file', '-e'),
    _flag('--thumbprint-only', 'Has no effect: nothing else is printed anyway'),
    _FORMAT_OPTION,
)
def _show_thumbprint(arguments: Any) -> int:
    as_json = _wants_json(arguments)
    thumbprint = our_identity(_logged_settings(arguments)).thumbprint
    if arguments.export_file:
        write_file(arguments.export_file, thumbprint.encode())
        return 0
    text = thumbprint
    if as_json:
        text = json.dumps({'Thumbprint': thumbprint}, separators=(',', ':'))
    # Without a line's end, as the original has it, but for a person at a terminal.
    print(text, end='\n' if sys.stdout.isatty() else '', flush=True)
    return 0


def _home_to_set(arguments: Any) -> Optional[str]:
    """What `configure --home` sets in an instance; None where it names the home whose settings are
    to be changed, as everywhere else.
    """
    if arguments.home is None:
        return None
    home = os.path.abspath(arguments.home)
    if not (arguments.instance or arguments.config):
        ours = find_settings(home)
        arguments.home = None
        if os.path.exists(ours) or not os.path.exists(find_settings()):
            arguments.home = home
            return None
    return home


def _listen_address(text: str) -> str:
    """'' for any. Raises UsageError."""
    import ipaddress

    if text.lower() in ('', 'any'):
        return ''
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise UsageError('--listenIpAddress %s: an address or any expected' % printable(text))


def _changed_values(arguments: Any) -> Dict[str, str]:
    """What `configure` sets, by the settings' keys. Raises UsageError."""
    changed = {}
    if arguments.app:
        changed[KEY_APPLICATIONS] = os.path.abspath(arguments.app)
    if arguments.port:
        changed[KEY_PORT] = str(_port(arguments.port))
    if arguments.noListen:
        changed[KEY_NO_LISTEN] = str(_boolean('--noListen', arguments.noListen)).lower()
    if arguments.listenIpAddress is not None:
        changed[KEY_LISTEN_IP] = _listen_address(arguments.listenIpAddress)
    if arguments.pollingConnectionCount:
        count = _connection_count(arguments.pollingConnectionCount)
        changed[KEY_POLLING_CONNECTIONS] = str(count)
    if arguments.files_root is not None:
        changed[KEY_FILES_ROOT] = _files_root(arguments.files_root) or ''
    for key, option in ((KEY_JOB_DAYS, 'job_days'), (KEY_JOB_COUNT, 'job_count')):
        text = getattr(arguments, option)
        if text is not None:
            changed[key] = str(_number('--job-days and --job-count', text, 1, 10**8))
    return changed


def _make_folder(path: str) -> None:
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise TentacleError('The directory %s can not be made: %s' % (path, error.strerror))


@_original(
    'configure',
    'Change the settings: who may call us, where we listen, where files may go',
    _value('--home', 'Home directory', '--homedir'),
    _value('--app', 'Directory that deployments put applications into', '--appdir'),
    _value('--port', 'Port to listen on'),
    _value('--noListen', 'True: listen on no port, for a polling tentacle'),
    _value('--listenIpAddress', 'Address to listen on, or any'),
    _value('--pollingConnectionCount', 'How many connections poll each server, 1 to 512'),
    _list('--trust', 'Thumbprint of a server to trust; may be repeated'),
    _list('--remove-trust', 'Thumbprint of a server to trust no more; may be repeated'),
    _flag('--reset-trust', 'First forget all servers that are trusted'),
    _value('--files-root', "No file outside this folder is uploaded or downloaded; '' = anywhere"),
    _value('--job-days', '`serve` keeps a job that is over so long (30)'),
    _value('--job-count', 'and so many of them (10000)'),
)
def _configure(arguments: Any) -> int:
    changed = _changed_values(arguments)
    trust = arguments.trust or arguments.remove_trust or arguments.reset_trust
    for thumbprint in arguments.trust + arguments.remove_trust:
        parse_thumbprint(thumbprint)
    home = _home_to_set(arguments)
    if home is not None:
        changed[KEY_HOME] = home
    if not (trust or changed):
        raise UsageError('Nothing to change: see configure --help')
    settings = _logged_settings(arguments)
    for key in (KEY_HOME, KEY_APPLICATIONS):
        if key in changed:
            _make_folder(changed[key])
    if trust:
        change_trust(settings.path, arguments.trust, arguments.remove_trust, arguments.reset_trust)
        trusted = read_settings(settings.path).trusted
        say('Trusted to call this host: %s' % (', '.join(trusted) or 'nobody'))
    if changed:
        change_settings(settings.path, lambda values: values.update(changed))
        for key, text in changed.items():
            say('%s is now: %s' % (key, text))
        _restart_hint()
    return 0


@_original(
    'set-polling-connection-count',
    'Change how many connections poll each server',
    _value('--pollingConnectionCount', 'How many, 1 to 512', '--count'),
)
def _set_polling_connection_count(arguments: Any) -> int:
    if not arguments.pollingConnectionCount:
        raise UsageError('How many? --pollingConnectionCount N expected')
    count = _connection_count(arguments.pollingConnectionCount)
    settings = _logged_settings(arguments)
    change_settings(
        settings.path, lambda values: values.update({KEY_POLLING_CONNECTIONS: str(count)})
    )
    say('Polling connection count set to: %d' % count)
    _restart_hint()
    return 0


@_original(
    'update-trust',
    'Trust the new thumbprint of a server in the place of its old one, however it is reached',
    _value('--oldThumbprint', 'The thumbprint of the server until now'),
    _value('--newThumbprint', 'The one it has from now on'),
)
def _update_trust(arguments: Any) -> int:
    if not arguments.oldThumbprint or not arguments.newThumbprint:
        raise UsageError('--oldThumbprint THUMBPRINT and --newThumbprint THUMBPRINT expected')
    old, new = parse_thumbprint(arguments.oldThumbprint), parse_thumbprint(arguments.newThumbprint)
    settings = _logged_settings(arguments)
    if old not in settings.trusted:
        say('%s is not trusted here, so nothing was changed' % old)
        return 0

    def change(servers: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
        return [
            dict(server, Thumbprint=new) if _has_thumbprint(server, [old]) else server
            for server in servers
        ]

    change_servers(settings.path, change)
    say('Trusted is %s now, in the place of %s' % (new, old))
    return 0


def _style(option: str, text: Optional[str]) -> int:
    style = _STYLE_NAMES.get((text or '').lower())
    if style is None:
        raise UsageError(
            '%s %s: TentaclePassive or TentacleActive expected' % (option, printable(text or "''"))
        )
    return style


def _server_address(text: str, port: Optional[str], default_port: int = POLLING_PORT) -> str:
    """`https://host:port/` of a host or a URL; `port` takes precedence over the URL's. Raises
    UsageError.
    """
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(text if '://' in text else 'https://' + text)
        known_port = parts.port
    except ValueError as error:
        raise UsageError('%s is no server: %s' % (printable(text), error))
    if parts.scheme not in ('http', 'https') or not parts.hostname or parts.path.strip('/'):
        raise UsageError('%s is no server: a host or https://HOST:PORT/ expected' % printable(text))
    host = '[%s]' % parts.hostname if ':' in parts.hostname else parts.hostname
    chosen = _number('The port', port, 1, 65535) if port else known_port or default_port
    return parse_target_uri('https://%s:%d/' % (host, chosen))


def _no_web_socket(text: Optional[str]) -> None:
    if text:
        raise UsageError(
            'tentacle.py does not speak web sockets (wss://): let the server be polled at its port '
            '10943, or through a proxy with polling-proxy'
        )


@_original(
    'server-comms',
    'Change how a server that is trusted is reached',
    _value('--thumbprint', 'Its thumbprint; may be left out where one server is trusted'),
    _value('--style', 'TentacleActive: we poll it; TentaclePassive: it calls us'),
    _value('--host', 'With TentacleActive: the host name of the server'),
    _value('--port', 'With TentacleActive: its port (10943)'),
    _value('--web-socket', 'Not spoken by tentacle.py'),
)
def _server_comms(arguments: Any) -> int:
    _no_web_socket(arguments.web_socket)
    style = _style('--style', arguments.style)
    address = ''
    if style == STYLE_POLLING:
        if not arguments.host:
            raise UsageError('--style TentacleActive needs --host HOST')
        address = _server_address(arguments.host, arguments.port)
    wanted = arguments.thumbprint and parse_thumbprint(arguments.thumbprint)
    settings = _logged_settings(arguments)
    if not settings.servers:
        raise TentacleError('No server is trusted yet: first configure --trust THUMBPRINT')
    if not wanted and len(set(settings.trusted)) > 1:
        raise UsageError('More than one server is trusted: which one? --thumbprint THUMBPRINT')
    wanted = wanted or settings.trusted[0]
    if wanted not in settings.trusted:
        raise TentacleError('%s is not trusted: first configure --trust %s' % (wanted, wanted))
    known = [server.subscription for server in settings.servers if server.thumbprint == wanted]
    subscription = ([text for text in known if text] or [new_subscription()])[0]
    changed = TrustedServer(wanted, style, address, subscription if address else '')
    trust_server(settings.path, changed, alone=not address)
    if address:
        say('%s is polled at %s for %s' % (wanted, address, subscription))
    else:
        say('%s calls us' % wanted)
    _restart_hint()
    return 0


_CHANGE_PROXY_OPTIONS = (
    _value('--proxyEnable', 'True: use a proxy; False: use none'),
    _value('--proxyHost', "Its host; left out, the environment's proxy is used"),
    _value('--proxyPort', 'Its port (80)'),
    _value('--proxyUsername', 'Who we are there'),
    _value('--proxyPassword', 'and the password, which is kept encrypted'),
)


def _proxy_host(text: str) -> Tuple[str, str]:
    """(host, port or '') of a host, or of a URL. Raises UsageError."""
    if not text:
        return '', ''
    proxy = parse_proxy(text)
    return proxy.host, str(proxy.port) if re.search(r':\d+/?\Z', text) else ''


def _change_proxy(arguments: Any, prefix: str) -> int:
    """Set one of the two proxies; what is not named stays, but for the host."""
    enable = arguments.proxyEnable is not None and _boolean('--proxyEnable', arguments.proxyEnable)
    host, port = _proxy_host(arguments.proxyHost or '')
    if arguments.proxyPort:
        port = str(_number('--proxyPort', arguments.proxyPort, 1, 65535))
    changed = {
        'UseDefaultProxy': str(enable and not host).lower(),
        'ProxyHost': host if enable else '',
    }
    if port:
        changed['ProxyPort'] = port
    if arguments.proxyUsername is not None:
        changed['ProxyUsername'] = arguments.proxyUsername
    settings = _logged_settings(arguments)
    if arguments.proxyPassword is not None:
        changed['ProxyPassword'] = protect(arguments.proxyPassword)
    change_settings(
        settings.path,
        lambda values: values.update({prefix + key: text for key, text in changed.items()}),
    )
    if not enable:
        say('No proxy is used')
    else:
        say('The proxy is now: %s' % (host or "the environment's"))
    _restart_hint()
    return 0


@_original('proxy', 'Change the HTTP proxy that scripts are told of', *_CHANGE_PROXY_OPTIONS)
def _proxy(arguments: Any) -> int:
    return _change_proxy(arguments, KEY_PROXY)


@_original(
    'polling-proxy',
    'Change the HTTP proxy through which servers are polled',
    *_CHANGE_PROXY_OPTIONS,
)
def _polling_proxy(arguments: Any) -> int:
    return _change_proxy(arguments, KEY_POLLING_PROXY)


@_original(
    'show-configuration',
    'Print the settings as JSON',
    _value('--file', 'Write them to this file'),
)
def _show_configuration(arguments: Any) -> int:
    settings = _logged_settings(arguments)
    servers = read_trusted(settings.path, read_settings_file(settings.path))
    members = ('Thumbprint', 'CommunicationStyle', 'Address', 'Squid', 'SubscriptionId')
    facts = {
        'Octopus': {
            'Home': settings.home,
            'Watchdog': {'Enabled': False, 'Instances': '*', 'Interval': 0},
        },
        'Tentacle': {
            'CertificateThumbprint': settings.thumbprint or None,
            'Communication': {
                'PollingConnectionCount': settings.polling_connections,
                'TrustedOctopusServers': [
                    dict(
                        {name: server.get(name) for name in members},
                        CommunicationStyle=TrustedServer.from_document(server).style,
                    )
                    for server in servers
                ],
            },
            'Deployment': {'ApplicationDirectory': settings.applications},
            'Services': {
                'ListenIP': settings.listen_address or None,
                'NoListen': settings.no_listen,
                'PortNumber': settings.port,
            },
        },
    }
    text = json.dumps(facts, indent=2, ensure_ascii=False)
    if arguments.file:
        write_file(arguments.file, text.encode('utf-8', 'backslashreplace') + b'\n')
    else:
        print(text, flush=True)
    return 0


# -- the service


_UNIT = """\
[Unit]
Description=Octopus Tentacle %(name)s (tentacle.py)
Wants=network-online.target
After=network-online.target

[Service]
Type=notify
NotifyAccess=main
%(user)sExecStart=%(command)s
# A script outlives its agent: at a stop or a restart the agent alone is ended.
KillMode=process
Restart=always
RestartSec=5
TimeoutStopSec=30
# Scripts inherit all that is said here, and have to change this host: so no Protect..., Private...
# or NoNewPrivileges. What does not hinder them: no core file holds our private key, no key ring is
# shared, and one script that takes too much memory does not end the agent.
LimitCORE=0
KeyringMode=private
OOMPolicy=continue

[Install]
WantedBy=%(target)s
"""
_CRON_HINT = (
    'There is no systemd here that would start it. Let cron do that: crontab -e, and there this '
    'line, which starts it at each boot (or poll and listen with their options): @reboot %s'
)


def _unit_word(text: str) -> str:
    """A word in a unit file (systemd.syntax(7)). Raises UsageError."""
    if not text.isprintable():
        raise UsageError('%s can not stand in the file of a service' % printable(text))
    return '"%s"' % text.replace('\\', '\\\\').replace('"', '\\"').replace('%', '%%')


class _Service:
    """The systemd unit of an instance: of the system for root, of its user for others.

    Every method raises TentacleError.
    """

    def __init__(self, arguments: Any):
        self._arguments = arguments
        self._is_root = os.geteuid() == 0
        # Looked up first: an instance that is not there is told of ahead of all else.
        self._settings_path = _settings_path(arguments)
        if not os.path.isfile(self._settings_path):
            raise TentacleError(
                'There are no settings %s yet: create-instance makes them' % self._settings_path
            )
        recorded = instances_of(self._settings_path)
        #: None: the settings are of no instance that has a name
        self._instance: Optional[str] = None
        self.name = 'OctopusDeploy-Tentacle'
        if arguments.config is None and recorded:
            self._instance = arguments.instance or recorded[0].name
            name = re.sub(r'\s+', '-', self._instance.replace('/', ''))
            self.name = re.sub(r'[^A-Za-z0-9:_.@-]', '_', name).lstrip('-') or self.name
        folder = UNIT_FOLDER
        if not self._is_root:
            configuration = os.environ.get('XDG_CONFIG_HOME') or os.path.expanduser('~/.config')
            folder = os.path.join(configuration, 'systemd', 'user')
        self._path = os.path.join(folder, self.name + '.service')

    def _agent_words(self) -> List[str]:
        words = [sys.executable, os.path.abspath(__file__), 'agent']
        if self._instance is None:
            return words + ['--config', self._settings_path, '--noninteractive']
        return words + ['--instance', self._instance, '--noninteractive']

    def require_systemd(self) -> None:
        import shutil

        if shutil.which('systemctl') is None:
            raise TentacleError(self._hint())

    def _hint(self) -> str:
        import shlex

        words = self._agent_words()
        name = MACHINE_HOME_VARIABLE
        if os.environ.get(name):
            words = ['%s=%s' % (name, os.environ[name])] + words
        return _CRON_HINT % ' '.join(map(shlex.quote, words))

    def systemctl(self, *words: str) -> None:
        import subprocess

        command = ['systemctl'] + ([] if self._is_root else ['--user']) + list(words)
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if done.returncode != 0:
            said = (done.stderr or done.stdout).decode(errors='replace').strip()
            if 'not been booted with systemd' in said or 'connect to bus' in said:
                raise TentacleError(self._hint())
            raise TentacleError(
                '`%s` failed with exit code %d: %s. See: journalctl %s-u %s'
                % (
                    ' '.join(command),
                    done.returncode,
                    printable(' '.join(said.split()) or 'no message', 1000),
                    '' if self._is_root else '--user ',
                    self.name,
                )
            )

    def _old_user(self) -> str:
        """Whom the unit names that is there already, be it ours or the original's."""
        with contextlib.suppress(OSError, ValueError), open(self._path, encoding='utf-8') as file:
            match = re.search(r'^User=(\S+)', file.read(), re.M)
            return match.group(1) if match else ''
        return ''

    def _unit(self, user: str) -> str:
        name = MACHINE_HOME_VARIABLE
        lines = 'User=%s\n' % user if user else ''
        if os.environ.get(name):
            lines += 'Environment=%s\n' % _unit_word('%s=%s' % (name, os.environ[name]))
        return _UNIT % {
            'name': self.name,
            'user': lines,
            'command': ' '.join(
                _unit_word(word).replace('$', '$$') for word in self._agent_words()
            ),
            'target': 'multi-user.target' if self._is_root else 'default.target',
        }

    def install(self) -> None:
        user = self._arguments.username or (self._old_user() if self._is_root else '')
        unit = self._unit(user if user != 'root' else '')
        if self._arguments.username or user not in ('', 'root'):
            self._give_to(user)
        is_new = not os.path.exists(self._path)
        os.makedirs(os.path.dirname(self._path), exist_ok=True)
        write_file(self._path, unit.encode())
        os.chmod(self._path, 0o644)
        try:
            self.systemctl('daemon-reload')
            self.systemctl('enable', self.name)
        except TentacleError:
            if is_new:
                os.unlink(self._path)
            raise
        runs_as = user or ('root' if self._is_root else user_name())
        say('Service installed: %s, as %s, to run as %s' % (self.name, self._path, runs_as))
        if not self._is_root:
            say('So that it runs while nobody is logged in: loginctl enable-linger')

    def _give_to(self, user: str) -> None:
        """Let a user have the settings, the key and what an agent writes in the home. Nothing is
        given that a third one could have put there.
        """
        import pwd

        if not self._is_root:
            raise UsageError('--username is for root: a unit of a user runs as that user')
        try:
            owner = pwd.getpwnam(user)
        except KeyError:
            raise UsageError('--username %s: there is no such user' % printable(user))
        settings = read_settings(self._settings_path)
        our_identity(settings)
        folder = os.path.dirname(settings.path)
        for path in (settings.path, settings.certificate_path, folder, settings.home):
            details = os.lstat(path)
            is_linked = not stat.S_ISDIR(details.st_mode) and details.st_nlink > 1
            is_linked = is_linked or stat.S_ISLNK(details.st_mode)
            if is_linked or details.st_uid not in (0, owner.pw_uid):
                raise TentacleError(
                    '%s is a link, or belongs neither to root nor to %s: it is not given to %s'
                    % (path, user, user)
                )
        if not os.path.isdir(settings.home):
            raise TentacleError('The home directory %s is none' % settings.home)
        os.chown(settings.path, owner.pw_uid, owner.pw_gid, follow_symlinks=False)
        os.chown(settings.certificate_path, owner.pw_uid, owner.pw_gid, follow_symlinks=False)
        for path in {folder, settings.home}:
            if not instances_folder().startswith(os.path.join(path, '')):  # that one is for all
                os.chown(path, owner.pw_uid, owner.pw_gid, follow_symlinks=False)
        for part in ('Logs', 'Work', 'Scripts', 'agents', '.uploads'):
            top = os.path.join(settings.home, part)
            with contextlib.suppress(FileExistsError):
                os.mkdir(top, 0o700)
            if stat.S_ISDIR(os.lstat(top).st_mode):
                os.chown(top, owner.pw_uid, owner.pw_gid, follow_symlinks=False)
            for _, folders, files, descriptor in os.fwalk(top):  # follows no link
                for name in folders + files:
                    os.chown(
                        name,
                        owner.pw_uid,
                        owner.pw_gid,
                        dir_fd=descriptor,
                        follow_symlinks=False,
                    )

    def _require_unit(self) -> None:
        if not os.path.exists(self._path):
            raise TentacleError(
                'There is no service %s yet: service --install makes %s' % (self.name, self._path)
            )

    def uninstall(self) -> None:
        self._require_unit()
        with contextlib.suppress(TentacleError):
            self.systemctl('stop', self.name)
        self.systemctl('disable', self.name)
        try:
            os.unlink(self._path)
        except OSError as error:
            raise TentacleError('%s can not be removed: %s' % (self._path, error.strerror))
        self.systemctl('daemon-reload')
        say('Service uninstalled: ' + self.name)

    def start(self) -> None:
        self._require_unit()
        self.systemctl('start', self.name)
        say('Service started: ' + self.name)

    def stop(self) -> None:
        self._require_unit()
        say('Stopping service: ' + self.name)
        self.systemctl('stop', self.name)
        say('Service stopped: ' + self.name)

    def restart(self) -> None:
        self._require_unit()
        say('Restarting service: ' + self.name)
        self.systemctl('restart', self.name)
        say('Service has been restarted: ' + self.name)


@_original(
    'service',
    'Install, start, stop or remove the systemd service of an instance',
    _flag('--install', 'Write its unit, and have it started at boot'),
    _flag('--uninstall', 'Stop it and remove its unit'),
    _flag('--start', 'Start it'),
    _flag('--stop', 'Stop it; scripts that run go on'),
    _flag('--restart', 'Stop and start it; scripts that run go on'),
    _flag('--reconfigure', 'Write its unit anew'),
    _value('--username', 'The user whom it runs as (root)', '--user'),
)
def _service(arguments: Any) -> int:
    wanted = [
        name
        for name in ('restart', 'stop', 'uninstall', 'install', 'reconfigure', 'start')
        if getattr(arguments, name)
    ]
    if not wanted:
        raise UsageError(
            'What shall be done? --install, --uninstall, --start, --stop, --restart or '
            '--reconfigure expected'
        )
    service = _Service(arguments)
    service.require_systemd()
    _logged_settings(arguments)
    for name in wanted:
        getattr(service, 'install' if name == 'reconfigure' else name)()
    return 0


# -- the REST side of an Octopus Server


_REST_SECONDS = 60.0  # between two bytes
_REST_SECONDS_IN_ALL = 300.0
_REST_BYTES = 64 << 20  # of an answer: all machines of a large server


def _host_of_url(url: str, port: int) -> str:
    """`https://host:port/` of the URL of a web site, whose path is of no interest. Raises
    UsageError.
    """
    match = re.match(r'https?://[^/?#@]+(?=[/?#]|\Z)', url, re.I)
    if not match:
        shown = '' if '@' in url else ', and is ' + printable(url)
        raise UsageError('--server must be https://HOST, without a password in it' + shown)
    return _server_address(match.group(), None, port)


class _ServerRefuses(TentacleError):
    """The server's answer is an error."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status  #: of HTTP


class OctopusServer:
    """An Octopus Server's REST API, for one command. Every method raises TentacleError.

    Its certificate is checked against this host's trusted ones, or pinned by `thumbprint`, or not
    at all (`insecure`).
    """

    def __init__(
        self,
        url: str,
        headers: Dict[str, str],
        proxy: Optional[Proxy] = None,
        thumbprint: Optional[str] = None,
        insecure: bool = False,
    ):
        self.url = url.rstrip('/')
        self._headers = dict(headers, Accept='application/json')
        self._proxy = proxy
        self._pinned = thumbprint
        self._insecure = insecure
        self._opener = self._new_opener(thumbprint is None and not insecure)

    def _new_opener(self, verifies: bool) -> Any:
        """What opens requests: through our proxy alone, and following no redirection."""
        import http.client
        import http.cookiejar
        import urllib.request

        context = ssl.create_default_context()
        if not verifies:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        pinned = self._pinned

        class Connection(http.client.HTTPSConnection):
            def connect(self) -> None:
                super().connect()
                shown = self.sock.getpeercert(True)
                if pinned is not None and not is_pinned(shown, [pinned]):
                    raise UntrustedThumbprint(
                        'The server shows the thumbprint %s, and --server-thumbprint is %s'
                        % (thumbprint_of(shown), pinned)
                    )

        class Handler(urllib.request.HTTPSHandler):
            def https_open(self, request: Any) -> Any:
                return self.do_open(Connection, request, context=context)  # type: ignore[arg-type]

        class NoRedirection(urllib.request.HTTPRedirectHandler):
            def redirect_request(self, *arguments: Any) -> None:
                """The API key is for the host that was named, and nobody else."""

        self._cookies = http.cookiejar.CookieJar()
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}),  # not those of the environment
            urllib.request.HTTPCookieProcessor(self._cookies),
            Handler(),
            NoRedirection(),
        )
        opener.addheaders = [('User-Agent', 'tentacle.py/' + __version__)]
        return opener

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """The answer's JSON, None where it has none; `path` from the server's root, or from the
        URL that it was named by where it begins with /api.
        """
        import http.client
        import urllib.error
        import urllib.request
        from urllib.parse import urljoin

        url = self.url + path if path.startswith('/api') else urljoin(self.url + '/', path)
        data = None if body is None else json.dumps(body).encode()
        headers = dict(self._headers)
        if data is not None:
            headers['Content-Type'] = 'application/json'
        for cookie in self._cookies:
            if cookie.name.startswith('Octopus-Csrf-Token'):
                headers['X-Octopus-Csrf-Token'] = cookie.value or ''
        request = urllib.request.Request(url, data, headers, method=method)
        if self._proxy is not None:
            request.set_proxy(str(self._proxy), 'http')
            if self._proxy.user:
                login = '%s:%s' % (self._proxy.user, self._proxy.password[:])
                token = base64.b64encode(login.encode()).decode()
                request.add_header('Proxy-Authorization', 'Basic ' + token)
        try:
            with self._opener.open(request, timeout=_REST_SECONDS) as answer:
                content = self._read(answer)
        except urllib.error.HTTPError as error:
            content = b''
            with error, contextlib.suppress(OSError, http.client.HTTPException):
                content = error.read(1 << 20)
            raise self._refused(method, url, error, content)
        except TentacleError:
            raise
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise self._not_reached(getattr(error, 'reason', error))
        try:
            return json.loads(content.decode('utf-8-sig')) if content.strip() else None
        except (ValueError, RecursionError):
            raise TentacleError(
                '%s answers with no JSON: is that the address of an Octopus Server? %s'
                % (url, printable(content[:100].decode(errors='replace')))
            )

    def _read(self, answer: Any) -> bytes:
        """All of an answer, of bounded size and in bounded time."""
        deadline = time.monotonic() + _REST_SECONDS_IN_ALL
        content = bytearray()
        while True:
            part = answer.read1(1 << 16)
            content += part
            if not part:
                return bytes(content)
            if len(content) > _REST_BYTES or time.monotonic() > deadline:
                raise TentacleError(
                    '%s answers with more than %d bytes, or for more than %g s'
                    % (self.url, _REST_BYTES, _REST_SECONDS_IN_ALL)
                )

    @staticmethod
    def _refused(method: str, url: str, error: Any, content: bytes) -> TentacleError:
        said = []
        with contextlib.suppress(ValueError, RecursionError):
            facts = json.loads(content.decode('utf-8-sig'))
            if isinstance(facts, dict):
                errors = facts.get('Errors')
                said = [facts.get('ErrorMessage')] + (errors if isinstance(errors, list) else [])
        text = ' '.join(printable(part, 1000) for part in said if part)
        if error.code in (301, 302, 303, 307, 308):
            text = 'it moved to %s: give that as --server' % printable(error.headers['Location'])
        if error.code == 401:
            text = (text + ' Is the API key right?').strip()
        return _ServerRefuses(
            'The server refuses %s %s (%d): %s'
            % (method, url, error.code, text or printable(error.reason)),
            error.code,
        )

    def _not_reached(self, reason: Any) -> TentacleError:
        if isinstance(reason, ssl.SSLCertVerificationError):
            return TentacleError(
                "%s shows a certificate that this host does not trust (%s). If it is the server's "
                'own, say so: --server-thumbprint %s; or --insecure for none of these checks'
                % (self.url, reason.verify_message, self.seen_thumbprint() or 'THUMBPRINT')
            )
        way = ' through the proxy %s' % str(self._proxy) if self._proxy is not None else ''
        if 'WRONG_VERSION_NUMBER' in str(reason):
            reason = 'it speaks no TLS; is it http://?'
        return TentacleError('%s can not be reached%s: %s' % (self.url, way, printable(reason)))

    def seen_thumbprint(self) -> Optional[str]:
        """The thumbprint of the certificate that the server shows, whoever it is."""
        with contextlib.suppress(TentacleError):
            stream = dial_tls(_host_of_url(self.url, 443), None, proxy=self._proxy)
            stream.close()
            return stream.thumbprint
        return None


def _server_at(uri: str, proxy: Optional[Proxy]) -> str:
    """The thumbprint of a server that polling tentacles may call, as it answers us (octopus-agent,
    Registration). Raises TentacleError.
    """
    stream = dial_tls(uri, None, proxy=proxy)
    try:
        host = uri[len('https://') : -1]
        stream.set_timeout(LIMITS.handshake)
        stream.write(('GET / HTTP/1.0\r\nHost: %s\r\n\r\n' % host).encode())
        line = stream.read_line(LIMITS.control_line) or ''
    finally:
        stream.close()
    if not re.match(r'HTTP/1\.\d 200\b', line):
        raise TentacleError(
            '%s is no port that tentacles poll: an HTTP answer with 200 expected, and it says %s'
            % (uri, printable(line, 80) or 'nothing')
        )
    if stream.thumbprint is None:
        raise TentacleError('%s shows no certificate' % uri)
    return stream.thumbprint


# -- registration (octopus-agent, Registration)


_SERVER_OPTIONS = (
    _value('--server', 'The Octopus Server, like https://octopus.example.com'),
    _value('--apiKey', 'An API key there (default: $OCTOPUS_API_KEY)'),
    _value('--apiKey-file', 'The API key is the first line of this file'),
    _value('--bearerToken', 'A bearer token, in the place of an API key'),
    _value('--username', 'A user there, in the place of an API key', '--user', '-u'),
    _value('--password', 'and the password', '-p'),
    _value('--server-thumbprint', "Of the server's certificate, where this host does not know it"),
    _flag('--insecure', "Do not check the server's certificate"),
)
_SPACE_OPTION = _value('--space', 'Name of the space there (default: its default one)')


def _first_line(option: str, path: str) -> str:
    """Raises UsageError."""
    try:
        with open(path, encoding='utf-8') as file:
            return file.readline().strip()
    except (OSError, ValueError) as error:
        raise UsageError('The file of %s can not be read: %s' % (option, error))


def _login(arguments: Any) -> Tuple[Dict[str, str], Optional[Dict[str, str]]]:
    """(headers, who is to be logged in first) of the server's options. Raises UsageError."""
    key = arguments.apiKey
    if arguments.apiKey_file:
        key = _first_line('--apiKey-file', arguments.apiKey_file)
    user, password, token = arguments.username, arguments.password, arguments.bearerToken
    if not (key or user or password or token):
        key = os.environ.get('OCTOPUS_API_KEY')
    if sum(map(bool, (key, user or password, token))) > 1:
        raise UsageError('One of --apiKey, --bearerToken and --username is enough')
    if bool(user) != bool(password):
        raise UsageError('--username and --password belong together')
    if not arguments.server:
        raise UsageError('Which Octopus Server? --server https://HOST expected')
    for text in (key, token):
        if text and not (text.isascii() and text.isprintable()):
            raise UsageError('The API key has characters that none has: is it another file?')
    if token:
        return {'Authorization': 'Bearer ' + token}, None
    if user:
        return {}, {'Username': user, 'Password': password}
    if not key:
        raise UsageError('Who are you there? --apiKey KEY or $OCTOPUS_API_KEY expected')
    return {'X-Octopus-ApiKey': key}, None


def _polled_address(arguments: Any) -> str:
    """Where the server is polled, by --server-comms-address and --server-comms-port, else on the
    host of --server. Raises UsageError.
    """
    # A URL that is given for this purpose means its own port, --server that of the web.
    given, default = arguments.server_comms_address, POLLING_PORT
    if not given:
        url = arguments.server
        address = _host_of_url(url if '://' in url else 'https://' + url, 443)
        given = address[len('https://') :].rpartition(':')[0]
    elif '://' in given:
        default = 443
    return _server_address(given, arguments.server_comms_port, default)


def _octopus_server(arguments: Any, proxy_of: Callable[[str], Optional[Proxy]]) -> OctopusServer:
    """Raises UsageError, TentacleError."""
    headers, login = _login(arguments)
    url = arguments.server if '://' in arguments.server else 'https://' + arguments.server
    pinned = arguments.server_thumbprint and parse_thumbprint(arguments.server_thumbprint)
    if pinned and url.lower().startswith('http://'):
        raise UsageError('--server-thumbprint is for https://, and --server is %s' % url)
    proxy = proxy_of(_host_of_url(url, 443))
    server = OctopusServer(url, headers, proxy, pinned, arguments.insecure)
    if login is not None:
        server.call('POST', '/api/users/login', login)
    return server


def _all(server: OctopusServer, path: str) -> List[Dict[str, Any]]:
    """The documents of a list. Raises TentacleError."""
    found = server.call('GET', path)
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise TentacleError('%s%s: a list of documents expected' % (server.url, path))
    if not all(re.match(r'[\w-]+\Z', str(entry.get('Id'))) for entry in found):
        raise TentacleError('%s%s: a document without an Id came' % (server.url, path))
    return found


def _self_link(server: OctopusServer, entry: Dict[str, Any]) -> str:
    """The path of a document. Raises TentacleError."""
    links = entry.get('Links')
    link = links.get('Self') if isinstance(links, dict) else None
    if not isinstance(link, str) or not re.match(r'/[^/]', link):
        raise TentacleError('%s does not say where %s is' % (server.url, entry['Id']))
    return link


def _is_named(entry: Dict[str, Any], name: str, *keys: str) -> bool:
    wanted = name.strip().lower()
    return any(str(entry.get(key)).strip().lower() == wanted for key in keys or ('Name',))


def _names(entries: Iterable[Dict[str, Any]]) -> str:
    return ', '.join(str(entry.get('Name')) for entry in entries) or 'none'


def _space_path(server: OctopusServer, name: Optional[str]) -> str:
    """What paths begin with: /api, or /api/Spaces-1. Raises TentacleError."""
    root = server.call('GET', '/api')
    links = root.get('Links') if isinstance(root, dict) else None
    if not isinstance(links, dict):
        raise TentacleError('%s/api is not that of an Octopus Server' % server.url)
    has_spaces = any(link.lower().startswith('spaces') for link in links)
    spaces = _all(server, '/api/spaces/all') if has_spaces else []
    if not spaces:
        if name:
            raise TentacleError('%s has no spaces, so there is none named %s' % (server.url, name))
        return '/api'
    for space in spaces:
        if _is_named(space, name) if name else space.get('IsDefault'):
            return '/api/%s' % space['Id']
    if name:
        raise TentacleError(
            'There is no space named %s on %s; there are: %s'
            % (printable(name), server.url, printable(_names(spaces)))
        )
    raise TentacleError('%s has no default space: say which, by --space' % server.url)


def _ids(server: OctopusServer, path: str, what: str, names: Sequence[str]) -> List[str]:
    """The ids of entries that names, slugs or ids mean. Raises TentacleError."""
    entries = _all(server, path) if names else []
    found = {
        name: [entry['Id'] for entry in entries if _is_named(entry, name, 'Name', 'Slug', 'Id')]
        for name in names
    }
    missing = [name for name, ids in found.items() if not ids]
    if missing:
        raise TentacleError(
            'There is no %s named %s on %s; there are: %s'
            % (what, printable(', '.join(missing)), server.url, printable(_names(entries)))
        )
    return [ids[0] for ids in found.values()]


def _list_of(value: Any) -> List[Any]:
    return value if isinstance(value, list) else []


def _tags(server: OctopusServer, path: str, names: Sequence[str]) -> List[str]:
    """Tenant tags by their canonical names. Raises TentacleError."""
    sets = _all(server, path) if names else []
    tags = [tag for entry in sets for tag in _list_of(entry.get('Tags'))]
    known = [str(tag.get('CanonicalTagName')) for tag in tags if isinstance(tag, dict)]
    for name in names:
        if name.lower() not in map(str.lower, known):
            raise TentacleError(
                'There is no tenant tag %s on %s; there are: %s'
                % (printable(name), server.url, printable(', '.join(known) or 'none'))
            )
    return [tag for name in names for tag in known if tag.lower() == name.lower()]


_REGISTER_OPTIONS = (
    *_SERVER_OPTIONS,
    _value('--name', 'Its name there (default: the name of this host)'),
    _SPACE_OPTION,
    _value('--policy', 'Name of its machine policy'),
    _value('--publicHostName', 'Where the server reaches it (default: the host name)', '-h'),
    _flag('--force', 'Change the one of that name, where there is one'),
    _value('--comms-style', 'TentaclePassive (default): the server calls it; TentacleActive'),
    _value('--proxy', 'TentaclePassive: name of the proxy through which the server calls it'),
    _value('--server-comms-address', 'TentacleActive: what it polls (default: --server)'),
    _value('--server-comms-port', 'TentacleActive: the port of that (10943)'),
    _value('--server-subscription-id', 'TentacleActive: the poll://NAME/ to poll for'),
    _value('--server-web-socket', 'Not spoken by tentacle.py'),
    _value('--tentacle-comms-port', 'TentaclePassive: the port it is called at, where another'),
)
_PARTICIPATIONS = ('Untenanted', 'TenantedOrUntenanted', 'Tenanted')


def _thumbprint_of_server(server: OctopusServer) -> str:
    """Of the certificate with which the server calls listening tentacles. Raises TentacleError."""
    facts = server.call('GET', '/api/configuration/certificates/certificate-global')
    try:
        return parse_thumbprint(str(facts['Thumbprint']))
    except (KeyError, TypeError, UsageError):
        raise TentacleError('%s does not say its thumbprint' % server.url)


def _polled_thumbprint(server: OctopusServer, address: str, proxy: Optional[Proxy]) -> str:
    """Of the certificate that the server shows where it is polled, which must be the one that it
    names over the web, where it does so: who shows another one stands between. Raises
    TentacleError.
    """
    seen = _server_at(address, proxy)
    named = None
    try:
        named = _thumbprint_of_server(server)
    except _ServerRefuses as error:
        if error.status not in (403, 404):  # who may register need not be allowed to see that
            raise
    if named not in (None, seen):
        raise UntrustedThumbprint(
            '%s shows the thumbprint %s, and %s says that it has %s: somebody may stand between. '
            'Nothing was registered' % (address, seen, server.url, named),
            seen,
        )
    return seen


class _Registration:
    """One `register-with` or `register-worker`, in the order of its steps. Raises TentacleError."""

    def __init__(self, arguments: Any, kind: str, machines: str):
        self._arguments = arguments
        self._kind = kind  # what messages say
        self._machines = machines  # what paths say
        style = arguments.comms_style or 'TentaclePassive'
        self._is_active = _style('--comms-style', style) == STYLE_POLLING
        _no_web_socket(arguments.server_web_socket)
        if arguments.proxy and self._is_active:
            raise UsageError('--proxy is for TentaclePassive; for TentacleActive: polling-proxy')
        _login(arguments)
        self._address = _polled_address(arguments) if self._is_active else ''
        self._port = arguments.tentacle_comms_port and _number(
            '--tentacle-comms-port', arguments.tentacle_comms_port, 1, 65535
        )
        host = (arguments.publicHostName or socket.gethostname()).lower()
        self._host = '[%s]' % host if ':' in host else host
        is_host = re.match(r'[\w.-]+\Z|\[[0-9a-f:.]+\]\Z', self._host)
        if not (is_host or self._is_active):
            raise UsageError('--publicHostName %s is no name of a host' % printable(host))
        subscription = arguments.server_subscription_id
        self._subscription = subscription and parse_subscription(subscription)

    def run(self, details: Callable[[OctopusServer, str], Dict[str, Any]]) -> int:
        """`details` gives what the document of its kind has besides name and end point."""
        arguments = self._arguments
        self._settings = settings = _logged_settings(arguments)
        self._identity = our_identity(settings)
        proxy_of: Callable[[str], Optional[Proxy]] = proxy_of_environment
        if self._is_active:
            proxy_of = settings.polling_proxy.proxy_of
        server = _octopus_server(arguments, proxy_of)
        space = _space_path(server, arguments.space or None)
        if self._is_active:
            thumbprint = _polled_thumbprint(server, self._address, proxy_of(self._address))
        else:
            thumbprint = _thumbprint_of_server(server)
        name = arguments.name or socket.gethostname()
        body = self._body(server, space, name, details)
        self._post(server, space, name, body)
        style = STYLE_POLLING if self._is_active else STYLE_LISTENING
        subscription = body['Endpoint']['Uri'] if self._is_active else ''
        trust_server(settings.path, TrustedServer(thumbprint, style, self._address, subscription))
        say('Machine registered successfully: %s, %s' % (name, body['Endpoint']['Uri']))
        say('Trusted is the server with the thumbprint ' + thumbprint)
        if server.url.lower().startswith('http://'):
            say('The API key went there unencrypted: whoever is on the way could read it')
        if self._is_active:
            _restart_hint()
        return 0

    def _body(
        self,
        server: OctopusServer,
        space: str,
        name: str,
        details: Callable[[OctopusServer, str], Dict[str, Any]],
    ) -> Dict[str, Any]:
        arguments = self._arguments
        policies = [arguments.policy] if arguments.policy else []
        (policy,) = _ids(server, space + '/machinepolicies/all', 'machine policy', policies) or [
            None
        ]
        body: Dict[str, Any] = {'Name': name}
        body.update(details(server, space))
        body['MachinePolicyId'] = policy
        if self._is_active:
            body['Endpoint'] = {
                'CommunicationStyle': 'TentacleActive',
                'Uri': self._subscription_to_use(),
                'Thumbprint': self._identity.thumbprint,
            }
            return body
        proxies = [arguments.proxy] if arguments.proxy else []
        (proxy,) = _ids(server, space + '/proxies/all', 'proxy', proxies) or [None]
        host = self._host
        port = self._port or self._settings.port
        body['Endpoint'] = {
            'CommunicationStyle': 'TentaclePassive',
            'Uri': parse_target_uri('https://%s:%d/' % (host, port)),
            'Thumbprint': self._identity.thumbprint,
            'ProxyId': proxy,
        }
        return body

    def _subscription_to_use(self) -> str:
        """The one that is given, or that polls this address already, or a new one."""
        known = [
            entry.subscription
            for entry in self._settings.polled()
            if entry.address.rstrip('/') == self._address.rstrip('/') and entry.subscription
        ]
        return self._subscription or (known or [new_subscription()])[0]

    def _post(self, server: OctopusServer, space: str, name: str, body: Dict[str, Any]) -> None:
        """Add the machine, or change the one of this name."""
        path = '%s/%s' % (space, self._machines)
        existing = [entry for entry in _all(server, path + '/all') if _is_named(entry, name)]
        if not existing:
            server.call('POST', path, body)
            return
        if not self._arguments.force:
            raise TentacleError(
                'There is a %s named %s already on %s; to change that one: --force'
                % (self._kind, printable(name), server.url)
            )
        changed = {key: value for key, value in body.items() if value is not None}
        server.call('PUT', _self_link(server, existing[0]), dict(existing[0], **changed))


@_original(
    'register-with',
    'Register this machine as a deployment target of an Octopus Server, and trust that',
    *_REGISTER_OPTIONS,
    _option(
        '--env',
        '--environment',
        dest='environment',
        metavar='VALUE',
        action='append',
        default=[],
        help='Name of an environment it is for; may be repeated',
    ),
    _option(
        '--role',
        '-r',
        metavar='VALUE',
        action='append',
        default=[],
        help='A role (target tag) it has; may be repeated',
    ),
    _list('--tenant', 'Name of a tenant it is for; may be repeated'),
    _list('--tenanttag', 'Set/tag of tenants it is for; may be repeated'),
    _value(
        '--tenanted-deployment-participation',
        'Untenanted (default), TenantedOrUntenanted or Tenanted',
    ),
)
def _register_with(arguments: Any) -> int:
    if not arguments.environment:
        raise UsageError('For which environment is it? --environment NAME expected')
    if not arguments.role:
        raise UsageError('Which role has it? --role NAME expected')
    given = (arguments.tenanted_deployment_participation or _PARTICIPATIONS[0]).lower()
    participation = {known.lower(): known for known in _PARTICIPATIONS}.get(given)
    if participation is None:
        raise UsageError(
            '--tenanted-deployment-participation %s: %s expected'
            % (printable(given), ', '.join(_PARTICIPATIONS))
        )

    def details(server: OctopusServer, space: str) -> Dict[str, Any]:
        environments = space + '/environments/all'
        return {
            'EnvironmentIds': _ids(server, environments, 'environment', arguments.environment),
            'Roles': arguments.role,
            'TenantIds': _ids(server, space + '/tenants/all', 'tenant', arguments.tenant),
            'TenantTags': _tags(server, space + '/tagsets/all', arguments.tenanttag),
            'TenantedDeploymentParticipation': participation,
        }

    return _Registration(arguments, 'deployment target', 'machines').run(details)


@_original(
    'register-worker',
    'Register this machine as a worker of an Octopus Server, and trust that',
    *_REGISTER_OPTIONS,
    _list('--workerpool', 'Name of a worker pool it joins; may be repeated'),
)
def _register_worker(arguments: Any) -> int:
    if not arguments.workerpool:
        raise UsageError('Which pool does it join? --workerpool NAME expected')

    def details(server: OctopusServer, space: str) -> Dict[str, Any]:
        pools = space + '/workerpools/all'
        return {'WorkerPoolIds': _ids(server, pools, 'worker pool', arguments.workerpool)}

    code = _Registration(arguments, 'worker', 'workers').run(details)
    settings = _settings(arguments)
    if settings.polled() and not settings.values.get(KEY_POLLING_CONNECTIONS):
        # A worker has many calls at once.
        count = str(max(5, os.cpu_count() or 1))
        change_settings(
            settings.path, lambda values: values.update({KEY_POLLING_CONNECTIONS: count})
        )
    return code


def _deregister(arguments: Any, kind: str, machines: str) -> int:
    _login(arguments)
    settings = _logged_settings(arguments)
    thumbprint = our_identity(settings).thumbprint
    proxy_of = settings.polling_proxy.proxy_of if settings.polled() else proxy_of_environment
    server = _octopus_server(arguments, proxy_of)
    path = '%s/%s/all' % (_space_path(server, arguments.space or None), machines)
    ours = []
    for entry in _all(server, path):
        endpoint = entry.get('Endpoint')
        own = endpoint.get('Thumbprint') if isinstance(endpoint, dict) else None
        shown = str(entry.get('Thumbprint') or own)
        if shown.upper() == thumbprint:
            ours.append(entry)
    if not ours:
        raise TentacleError('No %s on %s has our thumbprint %s' % (kind, server.url, thumbprint))
    if len(ours) > 1 and not arguments.multiple:
        raise TentacleError(
            'Several on %s have our thumbprint: %s; to remove all of them: --multiple'
            % (server.url, printable(_names(ours)))
        )
    for entry in ours:
        server.call('DELETE', _self_link(server, entry))
        say("Removed from the server: %s '%s'" % (kind, printable(entry.get('Name'))))
    say('The server is still trusted; to end that: configure --remove-trust THUMBPRINT')
    return 0


_DEREGISTER_OPTIONS = (
    *_SERVER_OPTIONS,
    _SPACE_OPTION,
    _option('--multiple', '-m', action='store_true', help='All that have our thumbprint'),
)


@_original(
    'deregister-from', 'Remove this machine from the targets of a server', *_DEREGISTER_OPTIONS
)
def _deregister_from(arguments: Any) -> int:
    return _deregister(arguments, 'deployment target', 'machines')


@_original(
    'deregister-worker', 'Remove this machine from the workers of a server', *_DEREGISTER_OPTIONS
)
def _deregister_worker(arguments: Any) -> int:
    return _deregister(arguments, 'worker', 'workers')


@_original(
    'poll-server',
    'Poll one more node of a server with which this machine is registered',
    *_SERVER_OPTIONS,
    _value('--server-comms-address', 'What is polled (default: --server)'),
    _value('--server-comms-port', 'The port of that (10943)'),
    _flag('--reuse-server-thumbprint', 'It has the thumbprint of the server that is trusted first'),
    _value('--server-web-socket', 'Not spoken by tentacle.py'),
)
def _poll_server(arguments: Any) -> int:
    _no_web_socket(arguments.server_web_socket)
    if arguments.reuse_server_thumbprint:
        if not arguments.server:
            raise UsageError('Which Octopus Server? --server https://HOST expected')
    else:
        _login(arguments)
    address = _polled_address(arguments)
    settings = _logged_settings(arguments)
    proxy_of = settings.polling_proxy.proxy_of
    if not arguments.reuse_server_thumbprint:
        thumbprint = _thumbprint_of_server(_octopus_server(arguments, proxy_of))
    elif settings.trusted:
        thumbprint = settings.trusted[0]
    else:
        raise TentacleError('No server is trusted yet, so there is no thumbprint to reuse')
    if thumbprint not in settings.trusted:
        raise TentacleError(
            'The server with the thumbprint %s is not trusted: first register-with, or '
            'configure --trust %s' % (thumbprint, thumbprint)
        )
    seen = _server_at(address, proxy_of(address))
    if seen != thumbprint:
        raise UntrustedThumbprint(
            '%s shows the thumbprint %s, and the server has %s' % (address, seen, thumbprint), seen
        )
    known = [entry.subscription for entry in settings.polled() if entry.thumbprint == thumbprint]
    subscription = ([entry for entry in known if entry] or [new_subscription()])[0]
    trust_server(settings.path, TrustedServer(thumbprint, STYLE_POLLING, address, subscription))
    say('%s is polled for %s' % (address, subscription))
    _restart_hint()
    return 0


# -- setup


class _Question(NamedTuple):
    """One of `setup`, which is also its option --NAME."""

    name: str
    text: str
    default: Callable[[Any], str]  # of the answers so far
    is_asked: Callable[[Any], bool]
    is_needed: bool = False


def _is_polling(answers: Any) -> bool:
    return answers.style == 'polling'


def _has_server(answers: Any) -> bool:
    return bool(answers.server)


def _is_worker(answers: Any) -> bool:
    return answers.kind == 'worker'


_QUESTIONS = (
    _Question(
        'instance', 'Name of the instance', lambda answers: DEFAULT_INSTANCE, lambda answers: True
    ),
    _Question(
        'style',
        'Listening or polling',
        lambda answers: 'listening',
        lambda answers: True,
    ),
    _Question(
        'directory',
        'Directory in which its settings and logs get one of their own',
        lambda answers: '/etc/octopus' if os.geteuid() == 0 else os.path.expanduser('~/.tentacle'),
        lambda answers: True,
    ),
    _Question(
        'app',
        'Directory that applications are deployed to',
        lambda answers: (
            '/home/Octopus/Applications'
            if os.geteuid() == 0
            else os.path.join(answers.directory, 'Applications')
        ),
        lambda answers: True,
    ),
    _Question(
        'port',
        'Port to listen on',
        lambda answers: str(LISTENING_PORT),
        lambda answers: not _is_polling(answers),
    ),
    _Question(
        'server',
        'URL of the Octopus Server (listening: empty = only trust a thumbprint)',
        lambda answers: '',
        lambda answers: True,
    ),
    _Question(
        'thumbprint',
        'Thumbprint of the Octopus Server',
        lambda answers: '',
        lambda answers: not _has_server(answers),
        True,
    ),
    _Question(
        'proxy',
        "HTTP proxy to the server, as http://HOST:PORT (empty = the environment's)",
        lambda answers: '',
        _is_polling,
    ),
    _Question(
        'key',
        'API key there (not shown)',
        lambda answers: os.environ.get('OCTOPUS_API_KEY', ''),
        _has_server,
        True,
    ),
    _Question('space', 'Space (empty = the default one)', lambda answers: '', _has_server),
    _Question(
        'name', 'Name of this machine there', lambda answers: socket.gethostname(), _has_server
    ),
    _Question('kind', 'Deployment target or worker', lambda answers: 'target', _has_server),
    _Question(
        'environments',
        'Environments, with commas',
        lambda answers: '',
        lambda answers: _has_server(answers) and not _is_worker(answers),
        True,
    ),
    _Question(
        'roles',
        'Roles, with commas',
        lambda answers: '',
        lambda answers: _has_server(answers) and not _is_worker(answers),
        True,
    ),
    _Question(
        'pools',
        'Worker pools, with commas',
        lambda answers: '',
        lambda answers: _has_server(answers) and _is_worker(answers),
        True,
    ),
)
_CHOICES = {'style': ('listening', 'polling'), 'kind': ('target', 'worker')}


def _checked_answer(question: _Question, text: str, answers: Any) -> str:
    """Raises UsageError."""
    text = text.strip()
    choices = _CHOICES.get(question.name)
    if choices:
        chosen = [choice for choice in choices if text and choice.startswith(text.lower())]
        if text in ('1', '2'):
            chosen = [choices[int(text) - 1]]
        if not chosen:
            raise UsageError('%s or %s expected' % choices)
        return chosen[0]
    is_needed = question.is_needed or question.name == 'server' and _is_polling(answers)
    if is_needed and not text.strip(' ,'):
        raise UsageError('%s is needed' % question.text)
    if text and question.name == 'thumbprint':
        return parse_thumbprint(text)
    if text and question.name == 'port':
        return str(_port(text))
    if text and question.name == 'proxy':
        parse_proxy(text)
    if text and question.name == 'server':
        _server_address(text, None)
    if question.name in ('directory', 'app'):
        return os.path.abspath(os.path.expanduser(text))
    return text


def _ask(question: _Question, answers: Any) -> str:
    """A person's answer, or the default; asked again until it is one. Raises UsageError at the end
    of the input.
    """
    import getpass

    default = question.default(answers)
    is_secret = question.name == 'key'
    shown = ' (%s)' % ('as in $OCTOPUS_API_KEY' if is_secret else default) if default else ''
    while True:
        prompt = '%s%s: ' % (question.text, shown)
        if is_secret and sys.stdin.isatty():
            line = getpass.getpass(prompt)
        else:
            print(prompt, end='', file=sys.stderr, flush=True)
            line = sys.stdin.readline()
            if not line:
                raise UsageError('The answers ended at: %s' % question.text)
        try:
            return _checked_answer(question, line.strip() or default, answers)
        except UsageError as error:
            _complain(str(error))


def _answers(arguments: Any) -> Any:
    """The arguments, with what was missing asked for. Raises UsageError."""
    if arguments.key_file:
        arguments.key = _first_line('--key-file', arguments.key_file)
    for question in _QUESTIONS:
        given = getattr(arguments, question.name)
        if not question.is_asked(arguments):
            setattr(arguments, question.name, '')
        elif given is not None:
            setattr(arguments, question.name, _checked_answer(question, given, arguments))
        elif arguments.yes:
            try:
                answer = _checked_answer(question, question.default(arguments), arguments)
            except UsageError as error:
                raise UsageError('%s: --%s' % (error, question.name))
            setattr(arguments, question.name, answer)
        else:
            setattr(arguments, question.name, _ask(question, arguments))
    return arguments


def _setup_commands(answers: Any) -> List[List[str]]:
    """The original's commands that the answers stand for; the API key is in the environment."""
    instance = ['--instance', answers.instance]
    file_name = 'tentacle-%s.config' % re.sub(r'[^\w.-]+', '-', answers.instance).lower()
    folder = os.path.join(answers.directory, file_name[len('tentacle-') : -len('.config')])
    commands = [
        ['create-instance', *instance, '--config', os.path.join(folder, file_name)],
        ['new-certificate', *instance, '--if-blank'],
    ]
    listens = ['--noListen', 'True']
    if not _is_polling(answers):
        listens = ['--port', answers.port, '--noListen', 'False']
    commands.append(['configure', *instance, '--app', answers.app, *listens])
    if answers.thumbprint:
        commands.append(['configure', *instance, '--trust', answers.thumbprint])
    if answers.proxy:
        proxy = parse_proxy(answers.proxy)
        words = ['polling-proxy', *instance, '--proxyEnable', 'True', '--proxyHost', proxy.host]
        words += ['--proxyPort', str(proxy.port)]
        if proxy.user:
            words += ['--proxyUsername', proxy.user]
        commands.append(words)
    if answers.server:
        words = ['register-with', *instance, '--server', answers.server, '--name', answers.name]
        if answers.space:
            words += ['--space', answers.space]
        listed = [('--environment', answers.environments), ('--role', answers.roles)]
        if _is_worker(answers):
            words[0] = 'register-worker'
            listed = [('--workerpool', answers.pools)]
        for option, texts in listed:
            for text in filter(None, map(str.strip, texts.split(','))):
                words += [option, text]
        words += ['--comms-style', 'TentacleActive' if _is_polling(answers) else 'TentaclePassive']
        words += ['--force'] * answers.force
        if answers.server_thumbprint:
            words += ['--server-thumbprint', answers.server_thumbprint]
        words += ['--insecure'] * answers.insecure
        if answers.server_comms_port:
            words += ['--server-comms-port', answers.server_comms_port]
        commands.append(words)
    if not answers.no_service:
        commands.append(['service', *instance, '--install', '--start'])
    return commands


def _prove(settings: Settings) -> int:
    """Whether the other side can be reached, or who it is that can reach us."""
    identity = our_identity(settings)
    code = 0
    for server in settings.polled():
        try:
            proxy = settings.polling_proxy.proxy_of(server.address)
            endpoint = ServiceEndPoint(parse_target_uri(server.address), server.thumbprint, proxy)
            connect(endpoint, identity, LIMITS, [server.thumbprint]).close()
            say('Reached: %s, and it shows the thumbprint that we trust' % server.address)
        except TentacleError as error:
            _complain('The server can not be reached: %s' % error)
            code = 1
    if settings.no_listen:
        return code
    try:
        stream = dial_tls('https://localhost:%d/' % settings.port, identity)
        stream.close()
        say('It listens on port %d, with the thumbprint %s' % (settings.port, stream.thumbprint))
    except TentacleError as error:
        _complain('Nothing listens on port %d yet: %s' % (settings.port, error))
        code = 1
    return code


def _keep_proxy_password(answers: Any) -> None:
    """In no process list: so by no command."""
    password = parse_proxy(answers.proxy).password[:]
    change_settings(
        find_instance(answers.instance).settings_path,
        lambda values: values.update({KEY_POLLING_PROXY + 'ProxyPassword': protect(password)}),
    )


@_command(
    'setup',
    'ask what is needed to set a tentacle up with an Octopus Server, and do it',
    'tentacle.py setup\n  tentacle.py setup --yes --style listening '
    '--thumbprint 6D7A63503024C1F8CBD8B6EDCAFCD6C84726EFB3',
    *[_option('--' + question.name, metavar='TEXT', help=question.text) for question in _QUESTIONS],
    _option('--key-file', metavar='FILE', help='The API key is the first line of this file'),
    _option('--server-comms-port', metavar='N', help='Port to poll (10943)'),
    _option(
        '--server-thumbprint', metavar='THUMBPRINT', help="Of the server's own web certificate"
    ),
    _option('--insecure', action='store_true', help="Do not check the server's web certificate"),
    _option('--force', action='store_true', help='Change the machine of that name on the server'),
    _option('--no-service', action='store_true', help='Install no systemd service'),
    _option('--yes', action='store_true', help='Ask nothing: take the options and the defaults'),
)
def _setup(arguments: Any) -> int:
    import shlex
    import shutil
    import subprocess

    answers = _answers(arguments)
    if shutil.which('systemctl') is None and not answers.no_service:
        _complain('There is no systemd here, so no service is installed')
        answers.no_service = True
    environment = dict(os.environ, OCTOPUS_API_KEY=answers.key or '')
    for words in _setup_commands(answers):
        shown = [shlex.quote(word) for word in words]
        key = 'OCTOPUS_API_KEY=*** ' if words[0].startswith('register') else ''
        say('$ %stentacle.py %s' % (key, _shown_words(shown)))
        command = [sys.executable, os.path.abspath(__file__)] + words
        if subprocess.call(command, env=environment) != 0:
            raise TentacleError(
                'That failed, and what comes after it was not done. Mend it, and run setup again: '
                'what was done stays as it is'
            )
        if words[0] == 'polling-proxy':
            _keep_proxy_password(answers)
    settings = read_settings(find_instance(answers.instance).settings_path)
    if answers.no_service:
        agent = ['python3', os.path.abspath(__file__), 'agent', '--instance', answers.instance]
        say('To start it: ' + ' '.join(map(shlex.quote, agent)))
        if not settings.polled():
            return 0
    return _prove(settings)


class _DemoProxy:
    """The least that an HTTP proxy can be: CONNECT and bytes both ways, on loopback."""

    def __init__(self) -> None:
        self._server = socket.create_server(('127.0.0.1', 0))
        self.port = self._server.getsockname()[1]
        start_thread('proxy', self._accept)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            start_thread('tunnel', self._tunnel, near)

    def _tunnel(self, near: socket.socket) -> None:
        with near, contextlib.suppress(OSError):
            asked = b''
            while not asked.endswith(b'\r\n\r\n'):
                asked += near.recv(1)
            host, _, port = asked.split()[1].decode().rpartition(':')
            say('  (proxy) %s' % asked.split(b'\r\n')[0].decode())
            with socket.create_connection((host, int(port))) as far:
                near.sendall(b'HTTP/1.0 200 OK\r\n\r\n')
                start_thread('tunnel', self._copy, far, near)
                self._copy(near, far)

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            for part in iter(lambda: source.recv(1 << 16), b''):
                target.sendall(part)
        _hang_up(source)
        _hang_up(target)

    def close(self) -> None:
        _hang_up(self._server)
        self._server.close()


class _Demo:
    """An agent and a dispatcher on loopback, each with a fresh identity, as two people would set
    them up.
    """

    _SCRIPT = 'echo "Hello from $(hostname), in $PWD"; echo "stderr comes too" >&2; exit 7'

    def __init__(self, folder: str):
        self._folder = folder
        self._agent_home = os.path.join(folder, 'agent')
        self._dispatcher_home = os.path.join(folder, 'dispatcher')

    def _command(self, home: str, *words: str) -> List[str]:
        import shlex

        say(
            '$ tentacle.py '
            + ' '.join(shlex.quote(word.replace(self._folder, '...')) for word in words)
        )
        return (
            [sys.executable, os.path.abspath(__file__)]
            + [words[0], '--home', home]
            + list(words[1:])
        )

    def _output(self, home: str, *words: str) -> str:
        import subprocess

        output = subprocess.check_output(
            self._command(home, *words), stderr=subprocess.DEVNULL
        ).decode()
        say('  ' + output.strip().replace('\n', '\n  '))
        return output

    def run(self) -> int:
        import subprocess

        say('-- The dispatcher makes its identity')
        ours = self._output(self._dispatcher_home, 'show-thumbprint')
        say('-- The host starts a listening tentacle that trusts it')
        agent = subprocess.Popen(
            self._command(self._agent_home, 'listen', '--port', '0', '--trust', ours),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:
            address = self._listening_address(agent.stdout)
            say('-- The dispatcher sees the host\'s thumbprint and trusts it')
            self._output(self._dispatcher_home, 'trust', '--yes', '--proxy', 'none', address)
            say('-- A script runs there, its output and exit code come here')
            exit_code = subprocess.call(
                self._command(
                    self._dispatcher_home, 'exec', address, '--proxy', 'none', '--', self._SCRIPT
                )
            )
            say('  exit code %d, as the script has it' % exit_code)
        finally:
            agent.terminate()
            agent.wait()
            agent.stdout.close()  # type: ignore[union-attr]
        if exit_code == 7:
            exit_code = self._run_polling(ours)
        say('-- Done; both homes are removed')
        return 0 if exit_code == 7 else 1

    def _run_polling(self, ours: str) -> int:
        import subprocess

        say('-- Now the host dials, through an HTTP proxy, and the dispatcher is the server')
        theirs = self._output(self._agent_home, 'show-thumbprint')
        self._output(self._dispatcher_home, 'trust', 'poll://demo/', theirs.strip())
        proxy = _DemoProxy()
        commands = [self._command(self._dispatcher_home, 'serve', '--port', '0')]
        processes = [
            subprocess.Popen(commands[0], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        ]
        try:
            line = processes[0].stdout.readline().decode().strip()  # type: ignore[union-attr]
            say('  ' + line)
            url = 'https://localhost:%s/' % line.rpartition(':')[2]
            through = ['--proxy', 'http://127.0.0.1:%d' % proxy.port]
            words = ['poll', url, '--trust', ours.strip(), '--subscription', 'poll://demo/']
            command = self._command(self._agent_home, *words, *through)
            silent = subprocess.DEVNULL
            processes.append(subprocess.Popen(command, stdout=silent, stderr=silent))
            exit_code = subprocess.call(
                self._command(self._dispatcher_home, 'exec', 'poll://demo/', '--', self._SCRIPT)
            )
            say('  exit code %d, as the script has it' % exit_code)
            return exit_code
        finally:
            for process in processes:
                process.terminate()
                process.wait()
            processes[0].stdout.close()  # type: ignore[union-attr]
            proxy.close()

    def _listening_address(self, output: Any) -> str:
        for line in output:
            text = line.decode().strip()
            say('  ' + text)
            if text.startswith('Agent listening on: '):
                return 'localhost:' + text.rpartition(':')[2]
        raise TentacleError('The agent did not start; see why: tentacle.py listen')


@_command('demo', 'see it work on this machine, in seconds', 'tentacle.py demo')
def _demo(arguments: Any) -> int:
    import tempfile

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    with tempfile.TemporaryDirectory(prefix='tentacle-demo-') as folder:
        return _Demo(folder).run()


_COMMON_OPTIONS = (
    _option(
        '--home',
        metavar='DIR',
        help='where identity, settings and workspaces are (default: $TENTACLE_HOME, else '
        "this machine's default instance, else /etc/octopus/default for root and ~/.tentacle for "
        'others)',
    ),
    _option('-v', '--verbose', action='store_true', help='say more, on stderr'),
)
_BASH_COMPLETION = '''\
_tentacle_py() {
    local word=${COMP_WORDS[COMP_CWORD]} home names
    if [ "$COMP_CWORD" = 1 ]; then
        COMPREPLY=($(compgen -W "@VERBS@" -- "$word"))
        return
    fi
    case "${COMP_WORDS[1]}:$word" in
@OPTIONS@
    *)
        for home in "$TENTACLE_HOME" ~/.tentacle /etc/octopus/default; do
            if [ -n "$home" ] && [ -r "$home/targets" ]; then
                names=$(sed -n 's/^\\[\\([A-Za-z0-9._:-]*\\)\\]$/\\1/p' "$home/targets")
                COMPREPLY=($(compgen -W "$names" -- "$word"))
                break
            fi
        done
        COMPREPLY+=($(compgen -f -- "$word"))
    esac
}
complete -F _tentacle_py tentacle.py
'''


def _long_options(command: Command) -> List[str]:
    return [
        name for names, _ in command.options + _COMMON_OPTIONS for name in names if name[:2] == '--'
    ]


def _bash_completion() -> str:
    options = [
        '    %s:-*) COMPREPLY=($(compgen -W "%s" -- "$word")) ;;'
        % (command.name, ' '.join(_long_options(command)))
        for command in COMMANDS.values()
    ]
    text = _BASH_COMPLETION.replace('@VERBS@', ' '.join(COMMANDS))
    return text.replace('@OPTIONS@', '\n'.join(options))


_FISH_TARGETS = r'''function __tentacle_py_targets
    for home in "$TENTACLE_HOME" ~/.tentacle /etc/octopus/default
        if test -r "$home/targets"
            sed -n 's/^\[\([A-Za-z0-9._:-]*\)\]$/\1/p' "$home/targets"
            return
        end
    end
end
complete -c tentacle.py -n "__fish_seen_subcommand_from exec upload download targets trust" \
    -a "(__tentacle_py_targets)"
'''


def _fish_completion() -> str:
    import shlex

    lines = []
    for command in COMMANDS.values():
        lines.append(
            'complete -c tentacle.py -n __fish_use_subcommand -f -a %s -d %s'
            % (command.name, shlex.quote(command.help))
        )
        for name in _long_options(command):
            lines.append(
                'complete -c tentacle.py -n "__fish_seen_subcommand_from %s" -l %s'
                % (command.name, name[2:])
            )
    return _FISH_TARGETS + '\n'.join(lines) + '\n'


@_command(
    'completion',
    'print what completes the commands, options and targets in a shell',
    'tentacle.py completion bash >> ~/.bashrc\n'
    '  tentacle.py completion fish >> ~/.config/fish/config.fish',
    _option('shell', choices=('bash', 'zsh', 'fish'), help='for which shell'),
)
def _completion(arguments: Any) -> int:
    if arguments.shell == 'fish':
        text = _fish_completion()
    else:
        text = _bash_completion()
    if arguments.shell == 'zsh':
        text = 'autoload -U +X bashcompinit && bashcompinit\n' + text
    sys.stdout.write(text)
    return 0


def _command_of(words: Sequence[str]) -> Optional[Command]:
    """The command that a command line begins with; the original's also as `--name` and `/name`."""
    if not words:
        return None
    if words[0] in COMMANDS:
        return COMMANDS[words[0]]
    first = words[0].lstrip('-/').lower()
    for command in COMMANDS.values():
        if command.is_original and first in (command.name, *command.aliases):
            return command
    return None


_OVERVIEW = """\
Usage: Tentacle <command> [<options>]

An Octopus Tentacle in one Python file, and a dispatcher for it.

Where <command> is one of:

%s

or of the words of the original Tentacle:

%s

Or use <command> --help for more details.
"""


def _overview() -> str:
    lists = []
    for is_original in (False, True):
        chosen = [entry for entry in COMMANDS.values() if entry.is_original == is_original]
        lists.append('\n'.join('  %-29s%s' % (entry.name, entry.help) for entry in chosen))
    return _OVERVIEW % tuple(lists)


def _unknown_command(name: str) -> int:
    near = nearest(name, COMMANDS)
    print("Command '%s' is not supported%s" % (printable(name), near), file=sys.stderr, flush=True)
    print("See 'Tentacle help'", flush=True)
    return 2


def _no_command(words: Sequence[str]) -> int:
    """What is said where the command is missing, or unknown."""
    if not any(words):
        sys.stdout.write(_overview())
        return 2
    return _unknown_command(words[0])


# -- our verbs


def _log_to_stderr(level: int) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter('%(asctime)s %(levelname)-7s %(message)s'))
    handler.setLevel(level)
    logger.addHandler(handler)
    logger.setLevel(min(level, logging.INFO))


def _formatter(words: Sequence[str]) -> Callable[..., Any]:
    """How argparse lays out its help. It asks for the terminal's width whether there is help to be
    shown or not, which costs an idle agent the memory of `shutil`: so it is told one.
    """
    import argparse

    if '-h' in words or '--help' in words:
        return argparse.RawDescriptionHelpFormatter
    return functools.partial(argparse.RawDescriptionHelpFormatter, width=80)


def _run_ours(command: Command, words: List[str]) -> int:
    """Parse and run one of our verbs; only its own parser is built."""
    import argparse

    parser = argparse.ArgumentParser(
        prog='tentacle.py ' + command.name,
        description=command.help,
        formatter_class=_formatter(words),
        epilog='%sexample:\n  %s' % (command.words and command.words + '\n\n', command.example),
    )
    for names, settings in command.options + _COMMON_OPTIONS:
        parser.add_argument(*names, **settings)
    cut = words.index('--') if command.words and '--' in words else len(words)
    arguments, unknown = parser.parse_known_args(words[1:cut])
    if unknown:
        names = [name for option in parser._actions for name in option.option_strings]
        near = nearest(unknown[0].partition('=')[0], names)
        parser.error('%s is not known here%s' % (printable(' '.join(unknown)), near))
    arguments.words = words[cut + 1 :]
    _log_to_stderr(logging.DEBUG if arguments.verbose else logging.INFO)
    arguments.command = command.name
    return command.function(arguments)


# -- the original's commands


_INSTANCE_OPTIONS = (
    _value('--instance', 'Name of the instance to use'),
    _value('--config', 'Configuration file to use'),
)
_HELP_OPTION = _flag('--help', 'Show detailed help for this command')
#: Taken everywhere, and not in any help.
_SILENT_OPTIONS = (
    _flag('--noninteractive', ''),
    _flag('--noconsolelogging', ''),
    _flag('--nologo', ''),
    _flag('--console', ''),
    _option('-v', '--verbose', action='store_true', help=''),
)
_LEADING_FLAGS = [names[0] for names, _ in _SILENT_OPTIONS if names[0].startswith('--')]
_HOME_OPTION = _value('--home', 'Home directory, in the place of an instance')


def _own_options(command: Command) -> List[Any]:
    """Those that a command's help shows as its own."""
    return list(_INSTANCE_OPTIONS if command.has_instance else ()) + list(command.options)


def _all_options(command: Command) -> List[Any]:
    options = _own_options(command) + [_HELP_OPTION, *_SILENT_OPTIONS]
    known = {name for names, _ in options for name in names}
    further = (_HOME_OPTION, *_INSTANCE_OPTIONS)
    return options + [option for option in further if option[0][0] not in known]


def _long_name(names: Sequence[str]) -> str:
    return next(name for name in names if name.startswith('--'))


def _original_form(options: Iterable[Any], words: Iterable[str]) -> Tuple[List[str], List[str]]:
    """(options as argparse takes them, words that are none of these options) of words in any of
    the original's forms. Raises UsageError.
    """
    known = {}
    for names, settings in options:
        for name in names:
            is_flag = settings.get('action') == 'store_true'
            known[name.lstrip('-').lower()] = _long_name(names), is_flag
    taken, unknown = [], []
    rest = iter(words)
    for word in rest:
        match = re.match(r'(?:--|-|/)([\w?-]+)(?:[=:](.*))?\Z', word, re.S)
        name, is_flag = known.get(match.group(1).lower(), ('', False)) if match else ('', False)
        value = match and match.group(2)
        if not name:
            unknown.append(word)
        elif is_flag:
            if value is None or value.lower() != 'false':
                taken.append(name)
        else:
            value = next(rest, None) if value is None else value
            if value is None:
                raise UsageError('%s needs a value: %s=VALUE' % (printable(word), name))
            taken.append('%s=%s' % (name, value))
    return taken, unknown


def _option_lines(options: Iterable[Any]) -> Iterator[str]:
    """As the original lays them out: names up to column 29, then the words in 49 columns."""
    for names, settings in options:
        shown = ', '.join(sorted(names, key=len))
        shown = shown + ('=VALUE' if 'metavar' in settings else '')
        lead = '  ' if re.match('-[a-z],', shown) else '      '
        line, text = (lead + shown).ljust(29), settings['help']
        if len(lead + shown) >= 29:
            yield lead + shown
            line = ' ' * 29
        while len(text) > 49 and ' ' in text[:49]:
            cut = text[:49].rindex(' ') + 1
            yield line + text[:cut]
            line, text = ' ' * 31, text[cut:]
        yield line + text


def _show_help(command: Command, arguments: Any) -> int:
    """A command's help, as text or as JSON."""
    if not command.is_original:
        return _run_ours(command, [command.name, '--help'])
    own = _own_options(command)
    if (getattr(arguments, 'format', None) or '').lower() == 'json':
        described = [
            [
                {'Name': _long_name(names).lstrip('-'), 'Description': settings['help']}
                for names, settings in o
            ]
            for o in (own, [_HELP_OPTION])
        ]
        facts = {'Name': command.name, 'Description': command.help}
        facts.update(Aliases=list(command.aliases), Options=described[0])
        facts['CommonOptions'] = described[1]
        _write_json(facts)
        return 0
    lines = ['Usage: Tentacle %s [<options>]' % command.name, '']
    lines += ['Where [<options>] is any of: ', ''] + list(_option_lines(own)) + ['']
    lines += ['Or one of the common options: ', ''] + list(_option_lines([_HELP_OPTION]))
    print('\n'.join(lines), flush=True)
    return 0


def _run_original(command: Command, words: List[str]) -> int:
    """Parse and run one of the original's commands. Raises TentacleError."""
    import argparse

    try:
        '\n'.join(words).encode()
    except UnicodeEncodeError:
        raise UsageError('The command line is not UTF-8: %s' % printable(' '.join(words)))
    options = _all_options(command)
    if words[1:] == ['-h'] and not any('-h' in names for names, _ in options):
        words = [words[0], '--help']
    if not any('--format' in names for names, _ in options) and '--help' in words:
        options.append(_FORMAT_OPTION)
    taken, unknown = _original_form(options, words[1:])
    parser = argparse.ArgumentParser(
        add_help=False,
        allow_abbrev=False,
        formatter_class=_formatter(()),  # type: ignore[arg-type]
    )
    for names, settings in options:
        parser.add_argument(*names, **settings)
    arguments = parser.parse_args(taken)
    arguments.words = []
    if command.name == 'help':
        arguments.words, unknown = unknown[:1], unknown[1:]
    if arguments.help:
        return _show_help(command, arguments)
    if unknown:
        names = [name for option in options for name in option[0]]
        near = nearest(unknown[0].partition('=')[0], names)
        raise UsageError(
            'Unrecognized command line arguments: %s%s' % (printable(' '.join(unknown)), near)
        )
    if not arguments.noconsolelogging:
        quiet = logging.INFO if command.name == 'agent' else logging.WARNING
        _log_to_stderr(logging.DEBUG if arguments.verbose else quiet)
    arguments.command = command.name
    return command.function(arguments)


@_original(
    'help',
    'List the commands, or show the options of one',
    _FORMAT_OPTION,
    aliases=('h', '?'),
    has_instance=False,
)
def _help(arguments: Any) -> int:
    if arguments.words:
        command = _command_of(arguments.words)
        if command is None:
            return _unknown_command(arguments.words[0])
        return _show_help(command, arguments)
    if not _wants_json(arguments):
        sys.stdout.write(_overview())
        return 0
    listed = [
        {'Name': command.name, 'Description': command.help, 'Aliases': list(command.aliases)}
        for command in COMMANDS.values()
        if command.is_original
    ]
    _write_json({'Commands': listed})
    return 0


@_original('version', 'Show the Tentacle version information', _FORMAT_OPTION, has_instance=False)
def _version(arguments: Any) -> int:
    if _wants_json(arguments):
        _write_json(
            {
                'InformationalVersion': TENTACLE_VERSION,
                'MajorMinorPatch': TENTACLE_VERSION,
                'NuGetVersion': TENTACLE_VERSION,
                'SourceBranchName': 'tentacle.py',
                'TentaclePyVersion': __version__,
            }
        )
    else:
        sys.stdout.write(TENTACLE_VERSION)
    return 0


def _told(command: Command, words: List[str]) -> int:
    """Run a command; what it can not do is told here, and in its log."""
    try:
        return (_run_original if command.is_original else _run_ours)(command, words)
    except TentacleError as error:
        _complain(str(error))
        return 1 if command.is_original else error.exit_code
    except PermissionError as error:
        hint = '' if os.geteuid() == 0 else '. Is it for root (sudo)?'
        _complain('%s%s' % (error, hint))
        return 1


@contextlib.contextmanager
def _own_handlers() -> Iterator[None]:
    """What is added to our loggers within goes at its end."""
    loggers = (logger, told_logger, audit_logger)
    before = [handler for target in loggers for handler in target.handlers]
    try:
        yield
    finally:
        for target in loggers:
            for handler in set(target.handlers).difference(before):
                target.removeHandler(handler)
                with contextlib.suppress(OSError):  # a full disk was told of when it came
                    handler.close()


def _leave_init_behind() -> None:
    """As process 1, of a container: go on as a child. The parent forwards signals, reaps whatever
    it inherits, and leaves with the child's exit code.
    """
    names = ('SIGTERM', 'SIGINT', 'SIGHUP', 'SIGQUIT', 'SIGUSR1', 'SIGUSR2', 'SIGCHLD')
    numbers = [getattr(signal, name) for name in names]
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
        return
    while True:
        number = signal.sigwait(numbers)
        if number != signal.SIGCHLD:
            os.kill(child, number)
            continue
        pid = -1
        while pid:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == child:
                os._exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else status >> 8)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a command line; the exit code. Nothing but a bug comes out as a traceback."""
    if os.name != 'posix':
        print(
            'tentacle.py is for Linux and other POSIX systems; on Windows use the original '
            'Octopus Tentacle.',
            file=sys.stderr,
        )
        return 1
    if sys.stdout is None:
        if sys.stderr is not None:
            _complain('there is no standard output: give one, or > /dev/null')
        return 2
    for number, name in enumerate(('stdin', 'stdout', 'stderr')):
        if getattr(sys, name) is None:  # or a socket would get its number
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, open(number, 'w' if number else 'r'))
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # and no stand-in of somebody who embeds us
            stream.reconfigure(errors='backslashreplace')
    if argv is None and sys.argv[1:2] == ['_launcher']:
        channel = socket.socket(fileno=os.dup(0))
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # or each supervisor would keep it open
        set_title('tentacle.py launcher')
        _limit_descriptors(int(sys.argv[2]) if sys.argv[2] else None)
        run_launcher(channel)
        return 0
    if argv is None and signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    words = list(sys.argv[1:] if argv is None else argv)
    if argv is None and words and words[0] in _RESIDENT_VERBS:
        if os.getpid() == 1:
            _leave_init_behind()
        set_title('tentacle.py ' + words[0])
    while len(words) > 1 and words[0].lower() in _LEADING_FLAGS:
        words.append(words.pop(0))
    command = _command_of(words)
    if command is None:
        return _no_command(words)
    try:
        with _own_handlers():
            return _told(command, words)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # who read our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, MemoryError) as error:
        _complain(str(error) or 'there is not enough memory')
        return 1


if __name__ == '__main__':
    sys.exit(main())
