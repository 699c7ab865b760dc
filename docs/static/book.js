// KaTeX sets every formula of the page. The text of an element is its LaTeX.
document.addEventListener("DOMContentLoaded", () => {
  for (const element of document.querySelectorAll(".math")) {
    katex.render(element.textContent, element, {
      displayMode: element.classList.contains("displayed"),
      throwOnError: false,
    });
  }
});
