"""The browser demo's few lines of CSS: a constant, the only HTML that it gives to its page."""

import streamlit as st

# An example's button lies over its whole card, so that a click on the picture asks. Keyboards and screen readers meet
# the button as ever, and without this style it stands under the picture.
STYLE = """<style>
[data-testid="stMainBlockContainer"] { padding-top: 3.5rem; }
[class*="st-key-card_"] { position: relative; border-radius: .5rem; transition: box-shadow .15s; }
[class*="st-key-card_"]:hover, [class*="st-key-card_"]:focus-within { box-shadow: 0 0 0 2px #c0392b; }
[class*="st-key-card_"] [class*="st-key-example_"] { position: absolute !important; inset: 0; z-index: 2; opacity: 0; }
[class*="st-key-card_"] [class*="st-key-example_"] :is(div, button) {
  width: 100% !important; height: 100% !important; }
[class*="st-key-card_"] [data-testid="stElementToolbar"] { display: none; }
</style>"""


def clickable_cards() -> None:
    st.html(STYLE)
