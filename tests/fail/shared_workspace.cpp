// expect: (deleted function|deleted copy|implicitly-deleted|deleted).*(Execution|Workspace|constructor)
#include <longspan/longspan.hpp>

// A copy would share one workspace between two calls at the same time.
longspan::Execution<> copied(const longspan::Execution<>& execution) { return execution; }
