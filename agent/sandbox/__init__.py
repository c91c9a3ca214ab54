"""Where a session's commands run and its files live. `contract` holds the types, `local` opens one."""
