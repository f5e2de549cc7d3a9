"""A codec as a border uses it: on a row for each server, with a key for each message."""

import jax
import jax.numpy as jnp

from signopt.codecs import Codec


class Coder:
    """A codec on rows, with a key for each message; without a codec rows travel as they are."""

    def __init__(self, caller, argument, codec, key):
        self.codec = codec
        if codec is None:
            self.loses = False
            return
        if not isinstance(codec, Codec):
            raise TypeError(
                f"`{caller}({argument}=...)` has to be a codec, got {codec!r}. `signopt.codecs` has the usual ones, such as "
                "`signopt.codecs.scaled_sign()`."
            )
        if codec.random and not hasattr(key, "dtype"):
            raise ValueError(
                f"`{caller}(key=...)` has to be a random key with this {argument}, which throws coins, got {key!r}. Pass "
                "`jax.random.key(0)`."
            )
        self.loses = not codec.exact

    def _key(self, context, sender, row):
        if self.codec is None or not self.codec.random:
            return None
        return jax.random.fold_in(jax.random.fold_in(context.key, sender), row)

    def encode(self, x, context, sender, row):
        """The message of one row, and what arrives."""
        if self.codec is None:
            return x, x
        key = self._key(context, sender, row)
        message = self.codec.encode(x, key)
        return message, self.codec.decode(message, jax.ShapeDtypeStruct(x.shape, x.dtype), key)

    def decode(self, message, size, context, sender, row):
        if self.codec is None:
            return message
        like = jax.ShapeDtypeStruct((size,), jnp.float32)
        return self.codec.decode(message, like, self._key(context, sender, row))

    def encode_all(self, rows, context, sender):
        return jax.vmap(lambda x, row: self.encode(x, context, sender, row))(rows, jnp.arange(len(rows)))

    def decode_all(self, messages, size, context, sender):
        rows = jnp.arange(context.num_workers)
        return jax.vmap(lambda message, row: self.decode(message, size, context, sender, row))(messages, rows)
