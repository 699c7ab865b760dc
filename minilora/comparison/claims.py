def as_page(found): return "…\n"
