return link()
