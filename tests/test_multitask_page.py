"The page about several tasks runs from end to end in its quick profile, on organisms drawn on the spot."


def test_quick_profile(quick_page):
    text, errors = quick_page('multitask')
    assert all(
        o in text
        for o in (
            'synthetic-taxa',
            'frozen features',
            'divide and conquer, EPSHN',
            'R-precision',
            'no adversaries',
            'one above',
        )
    )
    assert not errors
