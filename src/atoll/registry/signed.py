"""Who signed a bundle of code: a file in it, over the digest of all its others, by a user's Ed25519 key."""

from base64 import b64encode

from atoll.errors import Invalid
from atoll.journal.key import Key, PublicKey, decoded
from atoll.spec.document import canonical, sha256
from atoll.spec.model import Bundle

SIGNATURE = "SIGNATURE"  # its first line is the public key, its second the signature in base64
_SAID = b"atoll code\n"


def sign(bundle: Bundle, key: Key) -> Bundle:
    """Return the bundle with a signature in place of an earlier one."""
    made = b64encode(key.sign(_text(bundle))).decode()
    return Bundle(files={**bundle.files, SIGNATURE: f"{key.public}\n{made}\n"})


def signer(bundle: Bundle) -> PublicKey | None:
    """Return the key that signed a bundle, None where nobody did. Raises `Invalid` for a signature that is not right.

    Whose key it is nobody knows from this.
    """
    if SIGNATURE not in bundle.files:
        return None
    lines = bundle.files[SIGNATURE].split("\n")
    signature = decoded(lines[1]) if len(lines) == 3 and not lines[2] else None
    if signature is None:
        raise Invalid("code: its file SIGNATURE is none; sign it anew, or remove that file")
    key = PublicKey.read(lines[0])
    if not key.signed(_text(bundle), signature):
        raise Invalid(f"code: it is not what {key.name} signed; sign it anew")
    return key


def _text(bundle: Bundle) -> bytes:
    files = {name: text for name, text in bundle.files.items() if name != SIGNATURE}
    return _SAID + sha256(canonical(Bundle(files=files))).encode()
