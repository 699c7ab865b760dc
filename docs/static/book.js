// A page that is opened as a file may not read other pages: the search shows their titles alone.
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;

// KaTeX sets every formula of the page. The text of an element is its LaTeX.
document.addEventListener("DOMContentLoaded", () => {
  for (const element of document.querySelectorAll(".math")) {
    katex.render(element.textContent, element, {
      displayMode: element.classList.contains("displayed"),
      throwOnError: false,
    });
  }
});
