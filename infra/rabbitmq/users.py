# SPDX-License-Identifier: Apache-2.0
"""Creates RabbitMQ users with least privilege: definitions for the broker, passwords in files.

Needs only Python, none of this project's packages:

    python infra/rabbitmq/users.py --secrets secrets --url amqps://broker.example:5671/music > users.json
    rabbitmqctl import_definitions users.json          # or POST it to the management API's /api/definitions

Importing a definitions file adds or updates the objects in it and leaves all others alone. It contains salted hashes
only. Passwords, and URLs for ACESTEP_AMQP_URL_FILE, are written to the folder of --secrets as NAME.password and
NAME.url, readable by you alone, or by the user of --owner (a container reads its secrets as user 10001). Existing
passwords are reused, so the command can be repeated.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import re
import secrets
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

NOTHING = "^$"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_SALT_BYTES = 4
_PASSWORD_BYTES = 32


@dataclass(frozen=True)
class Role:
    """A role's permissions, as regular expressions for the names of queues and exchanges.

    A name must match one of them completely. ``keys`` restricts, by exchange, the routing keys for publishing; other
    exchanges are not restricted. The roles of one user add up.
    """

    about: str
    configure: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    read: tuple[str, ...] = ()
    keys: dict[str, str] = field(default_factory=dict)
    tags: tuple[str, ...] = ()


# Reply queues named by the broker: exclusive, so that no other connection can read them.
_OWN = r"amq\.gen-.*"
# Subscriber queues of acestep_consumer.client.
_CLIENT = r"acestep\.client\..*"
_ALL = r"acestep\..*"
_TASK_ID = "[A-Za-z0-9_-]{1,128}"

ROLES = {
    "producer": Role(
        "publishes requests, cancellations and status requests; reads replies from its own queue",
        configure=(_OWN,),
        write=(r"acestep\.requests", r"acestep\.control", _OWN),
        read=(_OWN,),
        keys={"acestep.requests": r"generate(\..*)?", "acestep.control": rf"(cancel\.{_TASK_ID}|status)"},
    ),
    "subscriber": Role(
        "receives events through its own queues",
        configure=(_OWN, _CLIENT),
        write=(_OWN, _CLIENT),
        read=(_OWN, _CLIENT, r"acestep\.events"),
    ),
    "worker": Role(
        "declares everything, takes requests, publishes events, replies and dead letters, but no requests",
        configure=(_ALL,),
        write=(r"acestep\.(?!requests$).*", r"amq\.default"),
        read=(_ALL,),
        keys={"acestep.control": r"(sync|tier)\..*"},
    ),
    "operator": Role(
        "full access to these queues: dead letters, topology, and the queue limit over the management API",
        configure=(_ALL,),
        write=(_ALL, r"amq\.default"),
        read=(_ALL,),
        tags=("monitoring", "policymaker"),
    ),
}


@dataclass(frozen=True)
class User:
    """A user and its roles."""

    name: str
    roles: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> User:
        """Parse ``NAME=ROLE+ROLE``, or ``ROLE`` alone for a user of that name.

        Raises:
            ValueError: the name or a role is invalid.
        """
        name, _, roles = text.partition("=")
        wanted = tuple((roles or name).split("+"))
        unknown = [role for role in wanted if role not in ROLES]
        if unknown or not _NAME.fullmatch(name):
            raise ValueError(f"{text!r} must be NAME=ROLE or NAME=ROLE+ROLE, with roles of {', '.join(ROLES)}")
        return cls(name, wanted)

    def permission(self, vhost: str) -> dict[str, str]:
        """Return the permissions in the format of a definitions file."""
        found = [ROLES[role] for role in self.roles]
        return {
            "user": self.name,
            "vhost": vhost,
            "configure": _joined(pattern for role in found for pattern in role.configure),
            "write": _joined(pattern for role in found for pattern in role.write),
            "read": _joined(pattern for role in found for pattern in role.read),
        }

    def topic_permissions(self, vhost: str) -> list[dict[str, str]]:
        """Return the restrictions on routing keys. An exchange that one role does not restrict is not restricted."""
        found = [ROLES[role] for role in self.roles]
        bounded = {exchange for role in found for exchange in role.keys}
        return [
            {"user": self.name, "vhost": vhost, "exchange": exchange, "read": ".*", "write": _joined(keys)}
            for exchange in sorted(bounded)
            if (keys := [role.keys.get(exchange, "") for role in found if _may_write(role, exchange)]) and all(keys)
        ]


def definitions(users: list[User], passwords: dict[str, str], vhost: str) -> dict[str, list[dict[str, object]]]:
    """Return the definitions for the broker."""
    topics = [found for user in users for found in user.topic_permissions(vhost)]
    return {
        "vhosts": [{"name": vhost}],
        "users": [
            {
                "name": user.name,
                "password_hash": password_hash(passwords[user.name]),
                "hashing_algorithm": "rabbit_password_hashing_sha256",
                "tags": ",".join(sorted({tag for role in user.roles for tag in ROLES[role].tags})),
            }
            for user in users
        ],
        "permissions": [dict(user.permission(vhost)) for user in users],
        # As the worker declares them: RabbitMQ 4 imports no permission on an exchange that does not exist.
        "exchanges": [_exchange(name, vhost) for name in sorted({found["exchange"] for found in topics})],
        "topic_permissions": [dict(found) for found in topics],
    }


def _exchange(name: str, vhost: str) -> dict[str, object]:
    kept = {"durable": True, "auto_delete": False, "internal": False, "arguments": {}}
    return {"name": name, "vhost": vhost, "type": "topic", **kept}


def password_hash(password: str) -> str:
    """Return RabbitMQ's salted SHA-256 of a password."""
    salt = secrets.token_bytes(_SALT_BYTES)
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()


def main() -> None:
    """Write the passwords and print the definitions."""
    arguments = _arguments()
    try:
        users = [User.parse(text) for text in arguments.users or ROLES]
        passwords = {user.name: _password(arguments.secrets, user.name) for user in users}
        for name, password in passwords.items():
            _keep(arguments.secrets / f"{name}.url", _url(arguments.url, name, password))
        if arguments.owner is not None:
            for path in (arguments.secrets, *sorted(arguments.secrets.iterdir())):
                os.chown(path, arguments.owner, -1)
    except (OSError, ValueError) as error:
        sys.exit(f"users.py: {error}")
    vhost = unquote(urlsplit(arguments.url).path.removeprefix("/")) or "/"
    print(json.dumps(definitions(users, passwords, vhost), indent=2))


def _arguments() -> argparse.Namespace:
    roles = "\n".join(f"  {name:11} {role.about}" for name, role in ROLES.items())
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog=f"roles:\n{roles}\n\nA program that submits and receives events, as the Python client does, has two: "
        "app=producer+subscriber.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("users", nargs="*", metavar="NAME=ROLE[+ROLE]", help="default: one user per role")
    parser.add_argument("--secrets", type=Path, required=True, help="folder for passwords and URLs; created if missing")
    parser.add_argument(
        "--owner", type=int, metavar="UID", help="give the files to this user; the container image's is 10001 (as root)"
    )
    parser.add_argument(
        "--url",
        default="amqp://127.0.0.1:5672/",
        help="URL of the broker and virtual host, without a user (default: %(default)s)",
    )
    return parser.parse_args()


def _joined(patterns: Iterable[str]) -> str:
    """Return one anchored expression; without anchors RabbitMQ matches anywhere in the name."""
    found = dict.fromkeys(patterns)
    return f"^({'|'.join(found)})$" if found else NOTHING


def _may_write(role: Role, exchange: str) -> bool:
    return any(re.fullmatch(pattern, exchange) for pattern in role.write)


def _password(folder: Path, name: str) -> str:
    """Return the existing password, or create one."""
    path = folder / f"{name}.password"
    if path.exists():
        if not (kept := path.read_text(encoding="utf-8").rstrip("\r\n")):
            raise ValueError(f"{path} is empty: write a password to it, or remove it to get a new one")
        return kept
    made = secrets.token_urlsafe(_PASSWORD_BYTES)
    _keep(path, made)
    return made


def _url(base: str, name: str, password: str) -> str:
    parts = urlsplit(base)
    if parts.scheme not in {"amqp", "amqps"} or not parts.hostname or "@" in parts.netloc:
        raise ValueError(f"--url {base!r} must look like amqps://broker.example:5671/vhost, without a user")
    return parts._replace(netloc=f"{quote(name, safe='')}:{quote(password, safe='')}@{parts.netloc}").geturl()


def _keep(path: Path, secret: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(path, "w", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(f"{secret}\n")


if __name__ == "__main__":
    main()
