"""The images of a request: bytes, a file of a folder that was allowed, or a public address."""

from __future__ import annotations

import socket
import ssl
import time
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from himap_train.data.images import resolve_image_path
from himap_train.data.records import ImageSource

MOST_BYTES = 32 * 2**20
_SECONDS = 20.0


def image_of(image: Any, where: str, folder: Path | None = None, private: bool = False) -> ImageSource:
    """What a request shows, not decoded yet.

    Args:
        image: the bytes of a file, `file://...` or `http(s)://...`.
        where: Names it in messages.
        folder: Where files may lie; None for no files.
        private: Addresses of this machine and of its network may be fetched too.

    Raises:
        ValueError: It must not be fetched, or cannot.
    """
    try:
        if isinstance(image, bytes):
            return image
        url = str(image)
        if url.startswith("file:"):
            if folder is None:
                raise ValueError("files are refused; the server reads those of a folder with --image-folder")
            return resolve_image_path(unquote(urlsplit(url).path), folder, where)
        return _fetched(url, private)
    except (ValueError, OSError, HTTPException) as error:
        raise ValueError(f"{where}: {error or type(error).__name__}") from error


def _fetched(url: str, private: bool) -> bytes:
    parts, until = urlsplit(url), time.monotonic() + _SECONDS
    kind = {"http": HTTPConnection, "https": HTTPSConnection}.get(parts.scheme)
    if kind is None or not parts.hostname:
        raise ValueError(f"{url[:60]!r} is no data:, file:// or http(s):// URL")
    connection = kind(parts.hostname, parts.port or {"http": 80, "https": 443}[parts.scheme])
    address = str(socket.getaddrinfo(parts.hostname, connection.port, type=socket.SOCK_STREAM)[0][4][0])
    if not private and not _public(address):
        raise ValueError(f"{parts.hostname} has no public address; the server asks others with --private-addresses")
    # The address that was judged is the one that is asked: a second look-up could give another.
    connection.sock = socket.create_connection((address, connection.port), timeout=_SECONDS / 2)
    try:
        if parts.scheme == "https":
            connection.sock = ssl.create_default_context().wrap_socket(connection.sock, server_hostname=parts.hostname)
        path = parts._replace(scheme="", netloc="", fragment="").geturl() or "/"
        connection.request("GET", path, headers={"User-Agent": "himap-train"})
        answer = connection.getresponse()
        if answer.status != 200:
            to = answer.getheader("Location")
            raise ValueError(f"{parts.hostname} answered {answer.status}" + (f": ask for {to} itself" if to else ""))
        body = bytearray()
        while part := answer.read1(2**16):
            body += part
            if len(body) > MOST_BYTES or time.monotonic() > until:
                raise ValueError(f"more than {MOST_BYTES >> 20} MiB or {_SECONDS:g} s; send it as a data: URL")
        return bytes(body)
    finally:
        connection.close()


def _public(address: str) -> bool:
    found = ip_address(address)
    if isinstance(found, IPv6Address):
        found = found.ipv4_mapped or found
    return found.is_global and not found.is_multicast
