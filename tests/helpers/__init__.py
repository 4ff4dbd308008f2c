"""What tests share: tiny models, handmade collections, forked runs, servers on loopback."""
