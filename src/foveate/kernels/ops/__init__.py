"""Every op's schema, fake and dispatch, one file a family."""
