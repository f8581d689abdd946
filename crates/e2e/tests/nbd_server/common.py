import errno, nbd, os, sys

uri = sys.argv[1]

def connect(*contexts, structured=True):
    """A handle that sends whatever it is told to, wrong or not."""
    h = nbd.NBD()
    h.set_strict_mode(0)
    h.set_request_structured_replies(structured)
    for context in contexts:
        h.add_meta_context(context)
    h.connect_uri(uri)
    return h

def fails(wanted, call, *arguments):
    try:
        call(*arguments)
    except nbd.Error as error:
        assert error.errnum == wanted, (call.__name__, arguments[-2:], error)
    else:
        raise AssertionError((call.__name__, arguments[-2:], "did not fail"))
