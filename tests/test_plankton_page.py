"The page of the plankton classifier runs from end to end in its quick profile, on organisms drawn on the spot."


def test_quick_profile(quick_page):
    text, errors = quick_page('plankton')
    assert all(
        o in text
        for o in (
            'small CNN, eight views',
            'Lite0 averaged + small CNN, eight views',
            'rare lifted',
            'exponent',
            'Lite0 + Lite0 again, eight views',
            'frozen Lite0, classifier',
            'my_plankton',
            'object_annotation_category',
            'meet at',
        )
    )
    assert not errors
