"""Proofs and measurements over a whole Troupe, from outside: real processes, real HTTP."""
