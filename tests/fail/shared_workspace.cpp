// expect: (deleted function|deleted copy|implicitly-deleted|deleted).*(Execution|Workspace|constructor)
#include <longspan/longspan.hpp>

// Two copies would be one workspace for two calls at one time.
longspan::Execution<> copied(const longspan::Execution<>& execution) { return execution; }
