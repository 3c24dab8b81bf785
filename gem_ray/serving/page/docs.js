// Swagger UI over this server's own description; nothing is loaded from, or sent to, anywhere else.

addEventListener("DOMContentLoaded", () => {
  SwaggerUIBundle({
    url: "openapi.json",
    dom_id: "#operations",
    deepLinking: true,
    docExpansion: "list",
    validatorUrl: null,
  });
});
