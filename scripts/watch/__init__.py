"""A page of runs that train: `reading` follows their logs, `server` hands these out, `page.html`
shows them."""
