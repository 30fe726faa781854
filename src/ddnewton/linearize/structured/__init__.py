"""The Gram matrix from layer inputs and pulled-back cotangents, for any model that is traced."""
