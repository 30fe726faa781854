// What scrolls sideways can be reached and scrolled by keys: wide tables and equations.
document$.subscribe(() =>
  requestAnimationFrame(() => {
    for (const wide of document.querySelectorAll(".md-typeset__scrollwrap, math[display=block]"))
      wide.setAttribute("tabindex", "0");
  }),
);
