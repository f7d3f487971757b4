"""Every private name of another package that the library uses, one folder for all: each behind one small function.

A function looks its name up when it is called, never at import, and its docstring says what it relies on and what
happens without it: a slower public way, or :class:`ImportError` with the installed version. ``tests/test_compat.py``
calls each of them, and fails where another file of the library uses a private name. ``nn.Module``'s ``_parameters``,
``_modules`` and ``_buffers``, and its extension points ``_apply``, ``_save_to_state_dict`` and
``_load_from_state_dict``, are used everywhere: torch has kept them for years.
"""
